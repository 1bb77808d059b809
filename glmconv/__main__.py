"""`python -m glmconv`, also under torchrun."""

from glmconv.cli import main

if __name__ == "__main__":
    main()
