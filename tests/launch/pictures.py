"""Takes the pictures in docs/pictures/ of the pages, light and dark, from real runs, in headless Chromium.

    python -m tests.launch.pictures RUNS [docs/pictures]

RUNS is a folder as `make demo` leaves it. Look at them before they are committed.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlencode

from launch.live import live_server
from tests.launch.browser import browser

LINES = "document.querySelectorAll('figure path.line').length > 3"
# name -> (page, names of runs, what is true once it stands, what is done then)
PICTURES = {
    "live": ("#", ("base", "base_continued"), LINES, "charts.values().next().value.point(200)"),
    "live_grpo": ("#", ("grpo",), LINES, ""),
    "report": ("report?", ("base", "warmup", "adapted"), "document.querySelectorAll('figure').length > 3", ""),
    "samples": ("samples?", ("grpo",), "document.querySelectorAll('#detail pre').length > 0", ""),
}


def main(runs: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, live_server([runs], 0) as serving, browser(Path(profile)) as page:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{serving.server_address[1]}/"
        for name, (at, chosen, stands, then) in PICTURES.items():
            for dark in (False, True):
                page.look(dark, 1280, 860)
                page.open("about:blank#")
                query = urlencode([("run", run) for run in chosen])
                page.run(f"location.href = '{root}{at}{query}'")
                page.until(stands)
                page.run(then or "0")
                assert page.errors == [], page.errors
                print(page.picture(out / f"{name}_{'dark' if dark else 'light'}.png"))
        serving.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/pictures"))
