"""Write every page of docs/reference/."""

from tests.support.reference import FOLDER, PAGES, generate_page


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        text = generate_page(name)
        (FOLDER / name).write_text(text)
        print(f"{FOLDER / name}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
