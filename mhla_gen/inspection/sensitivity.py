"""How replacing each single layer of a softmax model changes its output."""

from pathlib import Path

from mhla_gen.config import SensitivityConfig
from mhla_gen.config.inspection import FREE_OF_SCAN
from mhla_gen.inspection.sensitivity_plan import Plan, plan_by_count, plan_by_error
from mhla_gen.inspection.sensitivity_report import write_report
from mhla_gen.inspection.sensitivity_scan import LAYERS_NAME, Scan
from mhla_gen.outputs.folders import made_with
from mhla_gen.outputs.locks import claimed

DISTILLED_NAME = "distilled.safetensors"


def sensitivity(config: SensitivityConfig, dry_run: bool = False) -> Path:
    """Measure the output error that each layer would cause alone, and plan for a budget.

    Every layer is recorded when it is measured: the same command resumes an interrupted scan, and
    a finished one plans for another budget without measuring again.

    Args:
        config: Settings.
        dry_run: Load and check everything, print what would be measured, and write nothing.

    Returns:
        The folder with sensitivity.json, sensitivity.png and, for a budget, plan.yaml.

    Raises:
        ValueError: If settings, model and data do not fit together.
        OSError: If the model or data are missing, or the output folder holds something else.
    """
    config.require_model()
    folder = Path(config.output_dir)
    made_with(folder, config, FREE_OF_SCAN)
    scan = Scan.prepare(config)
    if dry_run:
        print(
            f"would measure {len(scan.layers)} layers on {len(scan.inputs)} inputs, of tokens "
            f"{scan.grid}, and write {folder}"
        )
        return folder
    print(f"measuring {scan.source}: tokens {scan.grid}", flush=True)
    with claimed(folder):
        return _measure(config, scan, folder)


def _measure(config: SensitivityConfig, scan: Scan, folder: Path) -> Path:
    scan.claim(folder)
    scan.distill(folder / DISTILLED_NAME)
    rows = scan.measure(folder / LAYERS_NAME)
    plan = plan_of(config, {row.layer: row.output_error for row in rows})
    joint = None if plan is None else scan.error_of(plan.mhla_layers)
    write_report(folder, config, scan.facts(), rows, plan, joint)
    print(f"wrote {folder / 'sensitivity.json'} and {folder / 'sensitivity.png'}")
    if plan is not None:
        print(f"layers {list(plan.softmax_layers)} stay softmax: '{plan.override}'")
        if config.mhla.exact == 0 and plan.exact_override is not None:
            print(f"or a share of their pairs, with model.mhla.exact: '{plan.exact_override}'")
    return folder


def plan_of(config: SensitivityConfig, errors: dict[int, float]) -> Plan | None:
    """The plan for the budget of the settings; None without one.

    Raises:
        ValueError: If no layer fits into it.
    """
    if config.softmax_layers is not None:
        return plan_by_count(errors, config.softmax_layers)
    if config.max_error is not None:
        return plan_by_error(errors, config.max_error)
    return None
