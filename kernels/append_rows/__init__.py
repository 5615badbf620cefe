"""How a compact cache grows, as the model sees it: schema and reference. Always rewritten before code generation."""

from avl_fx.kernels.append_rows.reference import append_rows_reference
from avl_fx.kernels.append_rows.schema import append_rows

__all__ = ["append_rows", "append_rows_reference"]
