"""Export a patched model to the formats that other engines open; one file per target."""

from toolkit.exporting.base import TARGETS, ConsumerOutput, ExportJob, ExportTarget, is_lossless
from toolkit.exporting.manifest import MANIFEST
from toolkit.exporting.writing import export

__all__ = ["MANIFEST", "TARGETS", "ConsumerOutput", "ExportJob", "ExportTarget", "export", "is_lossless"]
