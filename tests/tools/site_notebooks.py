"""A hook of mkdocs: notebooks lie beside docs/, and links to them lead to copies in the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks to the files of the site, under the path that links from docs/ have."""
    for path in sorted((Path(config.docs_dir).parent / "notebooks").glob("*.ipynb")):
        file = File(
            f"../notebooks/{path.name}",
            config.docs_dir,
            config.site_dir,
            config.use_directory_urls,
            dest_uri=f"notebooks/{path.name}",
            # Said here, because mkdocs leaves out what begins with a dot.
            inclusion=InclusionLevel.INCLUDED,
        )
        files.append(file)
    return files
