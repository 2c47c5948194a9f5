"""Zip files within limits; nothing is ever extracted to the disk."""

import io
import struct
import zipfile
import zlib
from pathlib import PurePosixPath

from shiftnet.interchange.limits import MAX_MEMBERS, Refusal, max_unpacked, short

# What `zipfile` raises for broken or unusual archives; it documents only the first.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,  # also UnicodeDecodeError
    NotImplementedError,
    EOFError,
    OSError,  # a seek before the start
    OverflowError,
)


class Zip:
    """The members of a zip file.

    Attributes:
      sizes: bytes of each member when unpacked, by name, as the archive's directory says.
      unpacked: their sum.
      comment: the text at the archive's end, at most 65,535 bytes.
    """

    def __init__(self, data: bytes) -> None:
        """Reads the directory.

        Raises:
          Refusal: for what is no zip file, a member that would leave the folder it is unpacked to,
            one that is no plain stored or deflated file, or too many or too large ones.
        """
        # Before `zipfile` makes an object of each: every entry of the directory has this mark.
        if data.count(b"PK\x01\x02") > MAX_MEMBERS:
            raise Refusal(f"it is a zip of more than {MAX_MEMBERS} members")
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except _BROKEN:
            raise Refusal("it starts as a zip file, but is cut short or broken") from None
        self.comment = self._archive.comment.decode("utf-8", "replace")
        members = self._archive.infolist()
        for member in members:
            name = PurePosixPath(member.filename.replace("\\", "/"))
            drive = member.filename[1:2] == ":"
            if drive or name.is_absolute() or ".." in name.parts:
                raise Refusal(f"it is a zip with a member outside it, {short(member.filename)}")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refusal(f"its member {short(member.filename)} is neither stored nor deflated")
            if member.flag_bits & 1:
                raise Refusal(f"its member {short(member.filename)} is encrypted")
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise Refusal("it is a zip with two members of one name")
        self.sizes = {name: member.file_size for name, member in self._members.items()}
        self.unpacked = sum(self.sizes.values())
        if self.unpacked > max_unpacked(len(data)):
            raise Refusal(
                f"it is a zip of {len(data)} bytes whose members unpack to {self.unpacked}, "
                f"expected at most {max_unpacked(len(data))}"
            )

    def read(self, name: str) -> bytes:
        """The bytes of a member, which must be as many as the directory says, with its checksum.

        Raises:
          Refusal: where they are not.
        """
        size = self.sizes[name]
        try:
            with self._archive.open(self._members[name]) as file:
                # Not `read()`, which would unpack all there is before it compares.
                data = file.read(size)
        except _BROKEN:
            raise Refusal(f"its member {short(name)} is broken") from None
        if len(data) != size:
            raise Refusal(f"its member {short(name)} must have {size} bytes, found {len(data)}")
        return data
