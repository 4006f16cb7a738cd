"""`python -m kalm_integrations` is `kalm`."""

from kalm_integrations.cli import main

if __name__ == "__main__":
    main()
