"""Write a small corpus of real text from what every Python has: the sources of its standard library.

    python examples/make_corpus.py examples/corpus

Every tenth file goes to `validation.txt`, the others to `train.txt`. Nothing is fetched.
"""

import argparse
import sysconfig
from pathlib import Path


def write_corpus(folder: Path) -> dict[str, int]:
    """Write `train.txt` and `validation.txt` into `folder`; returns their sizes in bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, chosen in (
        ("train.txt", [source for i, source in enumerate(sources) if i % 10]),
        ("validation.txt", sources[::10]),
    ):
        text = b"\n".join(source.read_bytes() for source in chosen)
        (folder / name).write_bytes(text)
        sizes[name] = len(text)
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, size in write_corpus(parser.parse_args().folder).items():
        print(f"{name}: {size:,} bytes")
