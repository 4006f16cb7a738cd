"""A hook of mkdocs: notebooks lie beside docs/, and links to them lead to copies in the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks to the files of the site, under the path that links from docs/ have."""
    for path in sorted((Path(config.docs_dir).parent / "notebooks").glob("*.ipynb")):
        copied = File.generated(config, f"../notebooks/{path.name}", abs_src_path=str(path))
        copied.dest_uri = f"notebooks/{path.name}"
        files.append(copied)
    return files
