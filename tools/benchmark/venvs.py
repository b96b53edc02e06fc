"""The environments of contenders that this one lacks: each has its own package, and everything else from here.

So all contenders run the same torch and the same transformers, and little needs to be downloaded.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from align.atomic import write_text
from tools.benchmark.protocol import BenchmarkError

MADE = "benchmark.txt"
"""In an environment that is whole: what was asked for."""

BORROWED = "borrowed.pth"
"""The file by which an environment finds the packages of this one."""


def python(folder: Path, requirement: str) -> Path:
    """The interpreter of an environment with a package; made where it is not there yet.

    Args:
        folder: Of all environments.
        requirement: As pip takes it: `trl==1.16.0`.

    Raises:
        BenchmarkError: pip has failed.
    """
    home = folder / requirement.replace("==", "-")
    interpreter, asked = home.absolute() / "bin" / "python", "\n".join([requirement, *_packages()]) + "\n"
    if (home / MADE).is_file() and (home / MADE).read_text(encoding="utf-8") == asked and interpreter.exists():
        return interpreter
    shutil.rmtree(home, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(home)], requirement, home)
    own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (own / BORROWED).write_text("\n".join(_packages()) + "\n", encoding="utf-8")
    _run(
        [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement],
        requirement,
        home,
    )  # fmt: skip
    write_text(home / MADE, asked)
    return interpreter


def _packages() -> list[str]:
    """Where the packages of this environment are."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _run(command: list[str], requirement: str, home: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-6:])
        raise BenchmarkError(
            f"no environment with {requirement}: `{' '.join(command)}` ended with exit code {done.returncode}, "
            f"expected 0. It said:\n{said}\n  Without a network, go on with --against plain, or with environments that "
            "were made before (--venvs FOLDER)"
        )
