"""Does the installation work? Every part is tested once, and failures come with a remedy."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mhla_gen.doctor import computing, installation
from mhla_gen.doctor.installation import Result, State
from mhla_gen.errors import UserError


class Finding(NamedTuple):
    """What one check found."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def examine(names: Sequence[str] = ()) -> list[Finding]:
    """Run the named checks, or all of them.

    Raises:
        ValueError: If there is no check of a name.
    """
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise UserError(f"checks must be among {', '.join(CHECKS)}; found {', '.join(unknown)}")
    return [_guarded(name, CHECKS[name]) for name in names or CHECKS]


def report(findings: list[Finding]) -> str:
    """Findings as a table, remedies below their row."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7} {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<7} {'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def _guarded(name: str, check: Callable[[], Result]) -> Finding:
    # A check tries foreign code on an unknown machine: whatever it raises is the finding.
    try:
        return Finding(name, *check())
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return Finding(name, "broken", f"{type(error).__name__}: {first}", REMEDIES.get(name, ""))


CHECKS: dict[str, Callable[[], Result]] = {
    "packages": installation.check_versions,
    "optional": installation.check_optional,
    "operator": computing.check_operator,
    "alignment": computing.check_alignment,
    "GPU": computing.check_gpu,
    "kernels": computing.check_kernels,
    "softmax": computing.check_softmax,
    "graphs": computing.check_graphs,
    "conversion": computing.check_conversion,
    "compile": computing.check_compile,
    "video": computing.check_video,
    "inception": installation.check_inception,
    "caches": installation.check_caches,
}

# What usually helps when a check raises.
REMEDIES = {
    "GPU": "install a torch build that fits the driver: https://pytorch.org/get-started/locally",
    "kernels": "use implementation=blockwise; Triton needs a C compiler and a GPU since Volta",
    "graphs": "leave compile off in sample, and set cuda_graphs=false in train",
    "compile": "install a C++ compiler (g++ or clang), or leave compile off, which nothing needs",
    "video": computing.VIDEO_REMEDY,
    "inception": "reinstall torch-fidelity",
}
