"""Give people who came after the training a vector in a finished personal run, from lists that they ranked."""

from palate import config as configs
from palate.artifacts import ArtifactError, os_errors
from palate.lpo.newcomers import NewcomersConfig, add_people


def main() -> None:
    try:
        with os_errors():
            made = add_people(configs.parse(NewcomersConfig, __doc__))
    except (ArtifactError, ValueError, OSError) as error:
        raise SystemExit(f"newcomers: {error}") from None
    print(f"{made.url}: {made.summary['people']} people, {made.summary['added']} of them new")


if __name__ == "__main__":
    main()
