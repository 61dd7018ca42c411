"""Read the bytes of an image from a data URL and, if the server allows it, from the web or a folder.

A client chooses the URL, so it must not lead into the server's own network or out of the folder: a name is looked up
once, all its addresses must be public, the connection goes to that very address, and each redirect is checked alike.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

from relook.errors import DataError
from relook.files import make_paths

DATA_URL = re.compile(r"data:[\w.+/;=-]*;base64,", re.ASCII | re.IGNORECASE)
# base64's alphabet for URLs, and the spaces and line breaks of mail and of `base64` on the command line.
URL_SAFE, BLANKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f"
NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")
REDIRECTS = 3
CHUNK = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class ImageSources:
    """Decide which image URLs a server reads.

    Args:
        max_bytes: of an image file.
        web: whether http and https URLs are followed.
        root: the folder below which file URLs may lie; None for no files.
        seconds: for a download, from its first lookup to its last byte.
    """

    max_bytes: int = 20_000_000
    web: bool = False
    root: Path | None = None
    seconds: float = 10.0

    def __post_init__(self) -> None:
        make_paths(self)

    def read(self, url: str) -> bytes:
        """Return the bytes that a URL leads to.

        Raises:
            DataError: it is not allowed, too large, or leads to nothing. The reason discloses nothing about the server.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._data(url)
        if scheme in ("http", "https") and self.web:
            return self._download(url)
        if scheme == "file" and self.root is not None:
            return self._file(url, self.root)
        raise DataError("This server does not take images from such a URL.", f"Send {self._taken()}.")

    def _taken(self) -> str:
        kinds = ["a data: URL with the image in base64"]
        kinds += ["an http or https URL"] * self.web + ["a file: URL below its media root"] * (self.root is not None)
        return " or ".join(kinds)

    def _sized(self, data: bytes) -> bytes:
        self._check_size(len(data))
        return data

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise DataError(f"The image has more than {self.max_bytes:,} bytes.", "Scale it down.")

    def _data(self, url: str) -> bytes:
        """Decode base64 as browsers do: with line breaks, escapes (%2B), or without its padding."""
        head = DATA_URL.match(url, 0, 200)
        if head is None:
            raise DataError("The data: URL does not say that it is base64.", "Write data:image/png;base64,...")
        encoded = url[head.end() :].encode(errors="replace")
        if b"%" in encoded:
            encoded = unquote_to_bytes(encoded)
        encoded = encoded.translate(URL_SAFE, BLANKS).rstrip(b"=")
        # base64 writes 3 bytes as 4 characters: the size is refused before anything is decoded.
        if len(encoded) > self.max_bytes * 4 // 3 + 4:
            raise DataError(f"The image has more than {self.max_bytes:,} bytes.", "Scale it down.")
        if NOT_BASE64.search(encoded):
            raise DataError("The data: URL has a character that base64 does not have.", "Encode the image again.")
        if len(encoded) % 4 == 1:
            raise DataError("The base64 of the data: URL is cut off.", "Send all of it.")
        return self._sized(base64.b64decode(encoded + b"=" * (-len(encoded) % 4)))

    def _file(self, url: str, root: Path) -> bytes:
        """Read a file below the root, whatever links or dots its path has."""
        parts = urlsplit(url)
        try:
            path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
            if parts.netloc in ("", "localhost") and path.is_relative_to(root.resolve()) and path.is_file():
                with path.open("rb") as file:  # one byte more than allowed tells a file that is too large
                    return self._sized(file.read(self.max_bytes + 1))
        except (OSError, ValueError, RuntimeError):  # nothing there, a NUL byte, links in a circle
            pass
        raise DataError("There is no such file below the media root.", "Give file:///PATH of a file in it.")

    def _download(self, url: str) -> bytes:
        deadline = time.monotonic() + self.seconds
        try:
            for _ in range(REDIRECTS + 1):
                with _Connection(url, deadline) as connection:
                    response = connection.ask()
                    location = response.headers.get("Location")
                    # Each redirect is a connection of its own, so its address is checked like the first one's.
                    if response.status in (301, 302, 303, 307, 308) and location:
                        url = urljoin(url, location)
                        continue
                    if response.status != 200:
                        raise DataError(f"The image's server answered {response.status}.", "Check the URL.")
                    return self._body(response, deadline)
        except (OSError, ValueError, http.client.HTTPException):
            raise DataError("The image could not be fetched.", "Check the URL.") from None
        raise DataError("The image's URL redirects too often.", "Give the URL that it ends at.")

    def _body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        data = bytearray()
        while chunk := response.read1(CHUNK):
            data += chunk
            self._check_size(len(data))
        if time.monotonic() > deadline:  # the timer cut the connection, which looks like the end of the body
            raise TimeoutError
        return bytes(data)


class _Connection:
    """Send one request to an address that was looked up once and found public, and cut it when its time is over."""

    def __init__(self, url: str, deadline: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError("The image's URL leads to no web server.", "Give an http or https URL.")
        self.host, secure = parts.hostname, parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        remaining = max(0.1, deadline - time.monotonic())
        address = public_address(self.host, port)
        self.http = http.client.HTTPConnection(self.host, port, timeout=remaining)
        plain = socket.create_connection((address, port), timeout=remaining)
        # The name is checked against the certificate, though the connection goes to the address.
        self.socket = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host) if secure else plain
        self.http.sock = self.socket
        # A socket's own timeout begins again with each byte: a slow sender could hold a thread for ever.
        self.cut = threading.Timer(deadline - time.monotonic(), self._cut)
        self.cut.start()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def ask(self) -> http.client.HTTPResponse:
        self.http.request("GET", self.path, headers={"Accept": "image/*", "User-Agent": "relook"})
        return self.http.getresponse()

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut.cancel()
        self.http.close()


def public_address(host: str, port: int) -> str:
    """Return the first address of a host, if all its addresses are public.

    Raises:
        DataError: it has an address in a private, local or special network.
        OSError: it has no address.
    """
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(is_public(ipaddress.ip_address(str(address).partition("%")[0])) for address in addresses):
        raise DataError("The image's URL leads into a private network.", "Give a public URL.")
    return str(addresses[0])


def is_public(address: Address) -> bool:
    """Return True if an address, and any IPv4 address embedded in it, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        # Mapped, 6to4, Teredo and NAT64 addresses lead to an IPv4 address inside them.
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(inner)
    return address.is_global and not address.is_multicast
