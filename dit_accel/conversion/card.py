"""Model card of a conversion, and its upload to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from ..common.files import read_json, replacing
from ..mechanisms.registry import PROCESSORS
from ..weights.tensors import FILE_NAME

__all__ = ["REPORT", "check_hub", "push_to_hub", "write_card"]

REPORT = "report"  # subfolder of the conversion for the results of evaluate
_PUSHED = (FILE_NAME, "convert.json", "README.md", f"{REPORT}/evaluate.*", f"{REPORT}/picture-*.png")


def write_card(folder: Path) -> Path:
    """Write ``README.md`` from ``convert.json`` and, if it exists, ``report/evaluate.json``."""
    about = read_json(folder / "convert.json")
    file = folder / REPORT / "evaluate.json"
    report = read_json(file) if file.is_file() else None
    parts = [_front_matter(about), _summary(folder, about), _training(about)]
    parts += [] if report is None else [_evaluation(report)]
    path = folder / "README.md"
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def check_hub(repository: str) -> None:
    """Check an upload before any work. Raises: ValueError: the name is not ``owner/name``, or no user is logged in."""
    if len([part for part in repository.split("/") if part]) != 2 or repository.count("/") != 1:
        raise ValueError(f"--push-to-hub takes owner/name, got {repository!r}")
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(
            f"--push-to-hub needs a login at the Hugging Face hub ({error}); run: hf auth login"
        ) from error


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload the attention file, ``convert.json``, the card and the report; a new repository is created as private.

    Returns: address of the repository.
    """
    api = HfApi()
    address = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(_PUSHED), commit_message="Add")
    return str(address)


def _front_matter(about: dict[str, Any]) -> str:
    """Metadata of the card as YAML."""
    pipeline = about["request"]["pipeline"]
    data = ModelCardData(
        library_name="diffusers",
        tags=["dit_accel", "efficient-attention", about["request"]["attention"]["name"]],
        base_model=None if Path(pipeline).is_dir() else pipeline,
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(folder: Path, about: dict[str, Any]) -> str:
    """Title, table of the options and code that loads the attention."""
    request = about["request"]
    teacher = request["pipeline"]
    teacher = Path(teacher).name if Path(teacher).is_dir() else teacher
    attention = PROCESSORS[request["attention"]["name"]].__name__.removesuffix("AttnProcessor")
    return f"""# {attention} attention for {teacher}

{attention} attention for `{teacher}`, fine-tuned with dit-accel. Per-layer options: table below.

{_table(_options_by_layer(request["attention"]), ("layers (regular expression)", "options"))}

```python
import dit_accel
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{teacher}")
dit_accel.load_attention(pipe, "{folder.name}")  # this folder or its hub id
```"""


def _options_by_layer(spec: dict[str, Any]) -> dict[str, str]:
    """Options by layers: those of all converted layers first, then the exceptions by regular expression."""
    exceptions = spec.get("exceptions", {})
    rows = {"all other converted layers" if exceptions else "all converted layers": spec["options"]}
    for layers, options in exceptions.items():
        escaped = layers.replace("|", r"\|")  # else it ends the cell of the Markdown table
        rows[f"`{escaped}`"] = options
    default = "defaults for the token grid"
    return {
        layers: f"`{', '.join(f'{key}={value}' for key, value in options.items())}`" if options else default
        for layers, options in rows.items()
    }


def _training(about: dict[str, Any]) -> str:
    request, recipe = about["request"], about["recipe"]
    data = f"pictures or clips of `{Path(request['data']).name}`" if request["data"] else (
        f"{request['samples']} samples drawn by the teacher"
    )  # fmt: skip
    per_step = f"{about['processes']} × {request['batch']} × {request['accumulate']}"
    rows = {
        "recipe": f"{recipe['name']} ({recipe['source']})",
        "trained parameters": f"{about['trained_parameters']:,}",
        "data": data,
        "steps": f"{about['steps']:,}",
        "samples per step (processes × batch × accumulation)": per_step,
        "mixed precision": request["mixed_precision"],
        "versions": ", ".join(f"{name} {about['versions'][name]}" for name in ("dit-accel", "torch", "diffusers")),
    }
    return "## Training\n\n" + _table(rows)


def _evaluation(report: dict[str, Any]) -> str:
    loss, check = report["flow_loss"], report.get("prompt_check")
    rows = {
        "computed logits": f"{report['logit_fraction']:.1%}",
        "loss, teacher": f"{loss['teacher']:.5f}",
        "loss, student": f"{loss['student']:.5f} ({100 * (loss['student_over_teacher'] - 1):+.2f} %)",
        "prediction error (relative squared distance to the teacher)": f"{report['prediction_error']:.2e}",
    }
    if check is not None:
        shares = f"{check['teacher']:.1%}, {check['student']:.1%}"
        rows[f"correctly drawn captions of {check['captions']:,}, teacher and student"] = shares
    pictures = [
        f"![{picture['prompt']}]({REPORT}/{picture['file']})\n\n*{picture['prompt']}*: teacher (left), student (right)"
        for picture in report["pictures"]
    ]
    heading = f"Means over {report['samples']} held-out samples ([all figures]({REPORT}/evaluate.json)):"
    return "## Evaluation\n\n" + "\n\n".join([heading, _table(rows), *pictures])


def _table(rows: dict[str, str], heading: tuple[str, str] = ("", "")) -> str:
    first = "| | |" if heading == ("", "") else f"| {' | '.join(heading)} |"
    return "\n".join([first, "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])
