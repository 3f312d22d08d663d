"""Whether the server of this container answers; the images have no curl."""

import os
import sys
import urllib.error
import urllib.request

PORT = os.environ.get("PORT", "8000")


def main() -> int:
    """Exit code: 0 if ``/health`` answers 200 within 5 seconds, else 1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError):
        return 1


if __name__ == "__main__":
    sys.exit(main())
