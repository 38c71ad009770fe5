"""`mhla-gen doctor`: try every part of the installation once."""

from mhla_gen.config import DoctorConfig
from mhla_gen.errors import UserError


def run(config: DoctorConfig, dry_run: bool) -> None:
    """Print what works; a broken part is an error.

    Raises:
        ValueError: If a part is broken.
    """
    from mhla_gen.doctor import CHECKS, examine, report

    if dry_run:
        print("would check: " + ", ".join(CHECKS))
        return
    findings = examine(config.checks)
    print(report(findings))
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if broken:
        raise UserError(f"{', '.join(broken)} does not work; the table names remedies")
