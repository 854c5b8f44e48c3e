"""python -m s1kernels"""

from s1kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
