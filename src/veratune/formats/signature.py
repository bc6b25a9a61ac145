"""Ed25519 signatures of adapter files: FILE.sig holds 64 bytes as base64.

The signature covers every byte of the file. Keys are PEM files, as `openssl genpkey -algorithm
ed25519` writes them.
"""

import base64
import binascii
from pathlib import Path

from veratune.errors import AdapterFileError, ConfigError
from veratune.formats.atomic import write_atomic

SUFFIX = ".sig"
_MAX_KEY_BYTES = 2**14


def sign(path: str | Path, private_key: str | Path) -> Path:
    """Sign a file.

    Args:
        path: The file.
        private_key: An Ed25519 private key, PEM without a password.

    Returns:
        The signature's file, beside the signed one.

    Raises:
        ConfigError: The key is not an Ed25519 private key.
        OutputError: The signature cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_pem(private_key), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{private_key}: not a PEM private key ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{private_key}: an Ed25519 key is wanted")
    out = Path(f"{path}{SUFFIX}")
    write_atomic(out, base64.b64encode(key.sign(Path(path).read_bytes())) + b"\n")
    return out


def verify(path: str | Path, public_key: str | Path) -> None:
    """Check a file's signature.

    Args:
        path: The file; its signature is beside it.
        public_key: An Ed25519 public key, PEM.

    Raises:
        ConfigError: The key is not an Ed25519 public key.
        AdapterFileError: The signature is missing, malformed, or not by this key for this content.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_pem(public_key))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{public_key}: not a PEM public key ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{public_key}: an Ed25519 key is wanted")
    try:
        text = Path(f"{path}{SUFFIX}").read_bytes()[:1024].strip()
        key.verify(base64.b64decode(text, validate=True), Path(path).read_bytes())
    except OSError as error:
        raise AdapterFileError(f"{path}{SUFFIX}: no signature: {error.strerror}") from None
    except (binascii.Error, ValueError) as error:
        raise AdapterFileError(f"{path}{SUFFIX}: not a base64 signature ({error})") from None
    except InvalidSignature:
        raise AdapterFileError(
            f"{path}: the signature is not by {public_key}, or the file was changed after signing"
        ) from None


def _pem(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()[:_MAX_KEY_BYTES]
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from None
