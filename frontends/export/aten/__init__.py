"""ATen operators as ONNX nodes, a file a family; importing them registers their handlers."""

from regraft.frontends.export.aten import (  # noqa: F401
    complex,
    creation,
    elementwise,
    indexing,
    linalg,
    nn,
    reduction,
    shape,
    sizes,
)
