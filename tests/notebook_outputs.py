"""Running the notebooks, and telling whether the outputs that are stored with them are current.

`make notebooks` (or `python tests/notebook_outputs.py`) runs each on a small run made now, and
stores it with its outputs. The gate does the same and compares: text must be equal but for numbers,
numbers equal up to rounding, pictures equal up to a few pixels. Seconds and folders do not count.
"""

import base64
import io
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NUMBER = re.compile(r"[−-]?\d[\d,]*(?:\.\d+)?(?:e[−+-]?\d+)?")
DIFFERING_PIXELS = 0.003
"""Share of a picture's pixels that may differ: each version of a font library draws text a little
differently."""


def execute(notebook: Any, folder: Path, run: Path) -> Any:
    """The notebook with its outputs, from a fresh kernel that works in `folder` on the run at
    `run`."""
    import nbclient

    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "TIP_RUN")
    }
    environment |= {"TIP_RUN": str(run), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return client.execute(env=environment)


def stored_form(notebook: Any, folder: Path) -> Any:
    """A notebook that ran, as it is stored: without times of cells, progress bars and the names of
    temporary folders."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [
                nbformat.from_dict(_without_folders(output, folder))
                for output in cell.outputs
                if not _is_progress(output)
            ]
    return notebook


def _is_progress(output: Any) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or output.get("name") == "stderr"


def _without_folders(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {
            key: part if key == "image/png" else _without_folders(part, folder)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [_without_folders(part, folder) for part in value]
    if not isinstance(value, str):
        return value
    value = value.replace(f"{folder}/", "")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/tip-analysis-\w+", "runs", value)


def differences(stored: Any, fresh: Any) -> Iterator[str]:
    """Where a stored notebook's outputs differ from those of a run of it now, cell by cell."""
    for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True), start=1):
        if old.cell_type != "code":
            continue
        if len(old.outputs) != len(new.outputs):
            yield f"cell {number}: {len(old.outputs)} outputs stored, {len(new.outputs)} now"
        for before, after in zip(old.outputs, new.outputs, strict=False):
            yield from (f"cell {number}: {reason}" for reason in _differing(before, after))


def _differing(before: Any, after: Any) -> Iterator[str]:
    kinds = set(_parts(before)) ^ set(_parts(after))
    if kinds:
        yield f"only one of them has {sorted(kinds)}"
    for kind in set(_parts(before)) & set(_parts(after)):
        old, new = _parts(before)[kind], _parts(after)[kind]
        reason = picture_differs(old, new) if kind == "image/png" else text_differs(old, new)
        if reason:
            yield f"{kind}: {reason}"


def _parts(output: Any) -> dict[str, str]:
    if output.output_type == "stream":
        return {"stream": output.text}
    return dict(output.get("data", {}))


def text_differs(old: str, new: str) -> str:
    """Where two texts differ in more than the rounding of their numbers, or nothing."""
    old, new = _comparable(old), _comparable(new)
    words = NUMBER.sub("0", old).split(), NUMBER.sub("0", new).split()
    if words[0] != words[1]:
        pair = next(((a, b) for a, b in zip(*words, strict=False) if a != b), None)
        return f"stored {pair[0]!r}, now {pair[1]!r}" if pair else "one text is longer"
    numbers = NUMBER.findall(old), NUMBER.findall(new)
    apart = [(a, b) for a, b in zip(*numbers, strict=True) if not _close(a, b)]
    return f"stored {apart[0][0]}, now {apart[0][1]}" if apart else ""


def _comparable(text: str) -> str:
    """A text without what differs from one run to the next: seconds of stages, keys of
    configurations (hashes), widths of drawn table borders."""
    text = re.sub(r"<td class=tip-n>[\d.,]+</td></tr>", "</tr>", text)
    text = re.sub(r"-[0-9a-f]{8}\b", "", text)
    return re.sub(r"[─━═┄┆┌┐└┘╞╡╪┬┴┼│]+", " ", text)


def _close(a: str, b: str) -> bool:
    if a == b:
        return True
    x, y = (float(value.replace(",", "").replace("−", "-")) for value in (a, b))
    if "." not in a and "e" not in a:
        return x == y
    return math.isclose(x, y, rel_tol=1e-2, abs_tol=2e-3)


def picture_differs(old: str, new: str) -> str:
    """How two PNG pictures differ, or nothing."""
    import numpy as np
    from matplotlib.image import imread

    before, after = (imread(io.BytesIO(base64.b64decode(text)))[..., :3] for text in (old, new))
    if before.shape != after.shape:
        return f"{before.shape} stored, {after.shape} now"
    share = float(np.mean(np.abs(before - after).max(axis=-1) > 0.2))
    return f"{share:.1%} of its pixels differ" if share > DIFFERING_PIXELS else ""


def fresh(path: Path, folder: Path, run: Path) -> Any:
    """The notebook at `path`, run now, in the form in which it is stored."""
    notebook = nbformat.read(path, as_version=4)
    return stored_form(execute(notebook, folder, run), folder)


def store_all() -> None:
    """Run every notebook and store it where its outputs are not current."""
    from tip_analysis.demo.example import make_small_run

    with tempfile.TemporaryDirectory(prefix="notebooks-") as name:
        folder = Path(name)
        run = make_small_run(folder / "runs" / "small")
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            old = nbformat.read(path, as_version=4)
            new = fresh(path, folder, run.path)
            changed = list(differences(old, new))
            print(f"{path.name}: {'; '.join(changed) or 'current'}")
            if changed:
                path.write_text(nbformat.writes(new) + "\n", "utf-8")


if __name__ == "__main__":
    store_all()
