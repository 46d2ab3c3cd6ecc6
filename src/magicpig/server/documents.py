"""Documents that are no text become text."""

from __future__ import annotations

import io

from magicpig.server.errors import ApiError
from magicpig.wording import printable


def pdf_text(data: bytes) -> str:
    """The text of a PDF file, a blank line between its pages. Raises ApiError, also where pypdf is not there."""
    try:
        import pypdf
    except ModuleNotFoundError:
        message = "PDF files cannot be read here: pypdf is not installed: pip install 'magicpig[pdf]'"
        raise ApiError(501, message, told="unsupported") from None
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except Exception as error:  # of a broken file anything may be wrong
        message = f"not a PDF file that can be read: {printable(str(error), 200)}"
        raise ApiError(400, message, told="bad_document") from None
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise ApiError(400, "the PDF file has no text: its pages may be pictures", told="bad_document")
    return text
