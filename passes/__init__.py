"""Graph to graph: one pass, one file."""

from regraft.passes.base import Context, Pass, PassResult, pass_named, registry, run
from regraft.passes.clean_up import CleanUp
from regraft.passes.fuse_linear import FuseLinear
from regraft.passes.keep_packed import KeepPacked
from regraft.passes.kvquant import KVQuant
from regraft.passes.outline import OutlineLayers
from regraft.passes.prune import Prune
from regraft.passes.raise_attention import RaiseAttention
from regraft.passes.raise_latent import RaiseLatent
from regraft.passes.raise_linear import RaiseLinear
from regraft.passes.raise_mask import RaiseMask
from regraft.passes.raise_sdpa import RaiseSdpa
from regraft.passes.raise_softmax import RaiseSoftmax
from regraft.passes.weight_quant import WeightQuant

DEFAULT: tuple[Pass, ...] = (
    CleanUp(),
    RaiseSoftmax(),
    RaiseMask(),
    RaiseLatent(),
    RaiseAttention(),
    FuseLinear(),
)
"""What every compiled model gets before the passes that the user asked for."""

GGUF: tuple[Pass, ...] = (KeepPacked(), FuseLinear())
"""What takes the place of FuseLinear where weights come from a GGUF file."""

STATELESS: tuple[Pass, ...] = (CleanUp(), RaiseSdpa(), FuseLinear())
"""The same for programs that keep no cache."""

FINAL: tuple[Pass, ...] = (OutlineLayers(),)
"""What follows those passes where regions are to be compiled."""

__all__ = [
    "DEFAULT",
    "FINAL",
    "STATELESS",
    "CleanUp",
    "Context",
    "FuseLinear",
    "GGUF",
    "KeepPacked",
    "KVQuant",
    "OutlineLayers",
    "Pass",
    "PassResult",
    "Prune",
    "RaiseAttention",
    "RaiseLatent",
    "RaiseLinear",
    "RaiseMask",
    "RaiseSoftmax",
    "RaiseSdpa",
    "WeightQuant",
    "pass_named",
    "registry",
    "run",
]
