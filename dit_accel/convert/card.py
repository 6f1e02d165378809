"""The model card of a conversion, and its way to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from ..files import read_json, replacing
from ..weights import FILE_NAME

__all__ = ["REPORT", "check_hub", "push_to_hub", "write_card"]

REPORT = "report"  # the folder of evaluate's results, in the conversion's
_PUSHED = (FILE_NAME, "convert.json", "README.md", f"{REPORT}/evaluate.*", f"{REPORT}/picture-*.png")


def write_card(folder: Path) -> Path:
    """Write ``README.md``: what ``convert.json`` tells, and what ``report/evaluate.json`` does, if it is there."""
    about = read_json(folder / "convert.json")
    file = folder / REPORT / "evaluate.json"
    report = read_json(file) if file.is_file() else None
    parts = [_front(about), _what(folder, about), _training(about), *([] if report is None else [_measured(report)])]
    path = folder / "README.md"
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def check_hub(repository: str) -> None:
    """Raises: ValueError: not ``owner/name``, or nobody is logged in."""
    if len([part for part in repository.split("/") if part]) != 2 or repository.count("/") != 1:
        raise ValueError(f"--push-to-hub takes owner/name, got {repository!r}")
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(f"--push-to-hub: the hub does not know you ({error}); run: hf auth login") from error


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload what ``load_attention`` takes, the card and the report, without samples and checkpoints; made private if
    the repository is new. Returns: its address."""
    api = HfApi()
    address = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(_PUSHED), commit_message="Add")
    return str(address)


def _front(about: dict[str, Any]) -> str:
    pipeline = about["request"]["pipeline"]
    data = ModelCardData(
        library_name="diffusers",
        tags=["dit_accel", "efficient-attention", about["request"]["attention"]["name"]],
        base_model=None if Path(pipeline).is_dir() else pipeline,
    )
    return f"---\n{data.to_yaml()}\n---"


def _what(folder: Path, about: dict[str, Any]) -> str:
    request = about["request"]
    teacher = request["pipeline"]
    teacher = Path(teacher).name if Path(teacher).is_dir() else teacher
    spec = request["attention"]
    options = ", ".join(f"{key}={value}" for key, value in spec["options"].items()) or "those of the token grid"
    for layers, others in spec.get("exceptions", {}).items():
        options += f"; {', '.join(f'{key}={value}' for key, value in others.items())} in layers named `{layers}`"
    return f"""# {teacher} with {spec["name"]} attention

dit_accel replaces the self-attention of {teacher} by {spec["name"]} ({options}). Here is what was learned for it.

```python
import dit_accel
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{teacher}")
dit_accel.load_attention(pipe, "{folder.name}")  # this folder, or its name on the hub
```"""


def _training(about: dict[str, Any]) -> str:
    request, recipe = about["request"], about["recipe"]
    data = f"the pictures or clips in {Path(request['data']).name}" if request["data"] else (
        f"{request['samples']} samples that the teacher drew itself"
    )  # fmt: skip
    rows = {
        "recipe": f"{recipe['name']} ({recipe['source']})",
        "trained": f"{about['trained_parameters']:,} parameters",
        "data": data,
        "steps": f"{about['steps']:,} of {about['processes']} × {request['batch']} × {request['accumulate']} samples",
        "precision": request["mixed_precision"],
        "made with": ", ".join(f"{name} {about['versions'][name]}" for name in ("dit-accel", "torch", "diffusers")),
    }
    return "## Training\n\n" + _table(rows)


def _measured(report: dict[str, Any]) -> str:
    loss, check = report["flow_loss"], report.get("prompt_check")
    rows = {
        "logits that are computed": f"{report['logit_fraction']:.1%}",
        "loss on held-out samples, teacher": f"{loss['teacher']:.5f}",
        "… student": f"{loss['student']:.5f} ({100 * (loss['student_over_teacher'] - 1):+.2f} %)",
        "distance of the predictions": f"{report['prediction_error']:.2e} of the teacher's square",
    }
    if check is not None:
        shares = f"{check['teacher']:.1%}, {check['student']:.1%}"
        rows[f"captions drawn right of {check['captions']:,}, teacher and student"] = shares
    pictures = [
        f"![{picture['prompt']}]({REPORT}/{picture['file']})\n\n*{picture['prompt']}* — teacher, student"
        for picture in report["pictures"]
    ]
    parts = [f"Over {report['samples']} samples ([all figures]({REPORT}/evaluate.json)):", _table(rows), *pictures]
    return "## Against its teacher\n\n" + "\n\n".join(parts)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])
