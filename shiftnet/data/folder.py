"""Images in folders, one per class, as PyTorch users have: `train/<class>/*`, `val/<class>/*`."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shiftnet.data import prepared
from shiftnet.data.classes import listed
from shiftnet.data.images import CorruptImage, Encoded, extensions
from shiftnet.data.prepared import PreparedSource
from shiftnet.errors import UserError
from shiftnet.files import path_of

TRAIN = "train"
TEST = ("val", "valid", "validation", "test")  # the first of these that exists is used

# Folders that systems put beside people's files; Synology's holds thumbnails of each image.
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")


class FolderSource:
    """The images of a split, sorted by class and then by file name, and read when asked for.

    A class is a folder, and the folders within it are searched too; its label is its place among
    the sorted names, which is how torchvision's `ImageFolder` numbers them. Hidden files, files
    without one of `extensions()` and class folders without images are left out and counted. What is
    pickled is the list of names, about 25 bytes per image for ImageNet.

    Args:
      folder: the split's folder, which holds the class folders.
      exif: whether images are turned as their EXIF orientation says.
      class_names: the names that labels stand for; None: those of the folders with images.

    Attributes:
      folder: as given.
      exif: as given.
      class_names: indexed by label.
      labels: int32 [N], of each image.
      missing: the members of `class_names` without images.
      left_out: what the folder holds besides, in words; empty where there is nothing.

    Raises:
      UserError: if there are no images in class folders, or a folder is not in `class_names`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        exif: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.exif = exif
        left_out = _LeftOut()
        try:
            found = _classes(self.folder, left_out)
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be read ({error})") from error
        self.left_out = str(left_out)
        if not found:
            raise UserError(f"{self.folder} has no class folders with images{left_out.hint()}")
        known = tuple(found) if class_names is None else tuple(class_names)
        if strange := sorted(found.keys() - set(known)):
            raise UserError(
                f"{self.folder} has {len(strange)} of {_counted(len(found), 'class', 'classes')} "
                f"without training images: {listed(strange)}"
            )
        self.class_names = known
        self.missing = tuple(name for name in known if name not in found)
        counts = [len(found.get(name, ())) for name in known]
        self.labels = np.repeat(np.arange(len(known), dtype=np.int32), counts)
        # One string of bytes, not a million objects: this goes to every worker process.
        encoded = [os.fsencode(file) for name in known for file in found.get(name, ())]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the path of an image's file.

        Raises:
          IndexError: if there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return str(self.folder / self.own_name(index))

    def own_name(self, index: int) -> str:
        """Returns the path of an image's file within the split's folder."""
        file = os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])
        return f"{self.class_names[self.labels[index]]}/{file}"

    def __getitem__(self, index: int) -> Encoded:
        """Reads an image's file.

        Raises:
          IndexError: if there is no such image.
          CorruptImage: if the file cannot be read.
        """
        return _read(self.name(index), int(self.labels[index]), self.exif)


class ListedSource:
    """The images that a CSV file lists, in its order, and read when asked for.

    Its first column is an image's path, from the folder on, and its second column the name of its
    class. A first line that names no file there and a class of its own is a heading, if there is no
    dot in it. Endings may be missing, as in Kaggle's lists.

    Args:
      listing: the CSV file.
      folder: where the images are.
      exif: whether images are turned as their EXIF orientation says.

    Attributes:
      folder, exif: as given.
      class_names: the names in the list, sorted, indexed by label.
      labels: int32 [N], of each image.

    Raises:
      UserError: if the list cannot be read, is empty, or names a file that does not exist, or one
        twice.
    """

    def __init__(
        self,
        listing: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        exif: bool = False,
    ) -> None:
        self.folder, self.exif = path_of(folder, "--data-dir"), exif
        try:
            with path_of(listing, "--labels").open(newline="", encoding="utf-8-sig") as opened:
                rows = [[cell.strip() for cell in row] for row in csv.reader(opened) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{listing} cannot be read as CSV ({error})") from error
        first, classes = rows[0] if rows else [], {row[1] for row in rows[1:] if len(row) > 1}
        is_new = len(first) > 1 and first[1] not in classes
        if is_new and "." not in first[0] and self._file(first[0]) is None:
            del rows[0]
        if not rows:
            raise UserError(f"{listing} lists no images; expected lines such as cat1.jpg,cat")
        files: dict[str, None] = {}
        for row in rows:
            file, found = row[0], self._file(row[0])
            if len(row) < 2 or found is None:
                wrong = "names no class" if len(row) < 2 else f"is not a file in {self.folder}"
                raise UserError(f"{listing}: {file!r} {wrong}")
            if found in files:
                raise UserError(f"{listing}: {file!r} is listed twice, expected once")
            files[found] = None
        self._files = list(files)
        names = [row[1] for row in rows]
        self.class_names = tuple(sorted(set(names)))
        places = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([places[name] for name in names], np.int32)

    def _file(self, written: str) -> str | None:
        """Returns the name of the file that is meant, if there is one."""
        endings = ("", ".jpg", ".jpeg", ".png")
        return next(
            (written + end for end in endings if (self.folder / (written + end)).is_file()), None
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the path of an image's file."""
        return str(self.folder / self._files[index])

    def __getitem__(self, index: int) -> Encoded:
        """Reads an image's file.

        Raises:
          CorruptImage: if the file cannot be read.
        """
        return _read(self.name(index), int(self.labels[index]), self.exif)


def _read(path: str, label: int, exif: bool) -> Encoded:
    try:
        return Encoded(Path(path).read_bytes(), label, path, exif)
    except OSError as error:
        raise CorruptImage(path, f"cannot be read ({error.strerror or error})") from error


# Some images in class folders, and what `shiftnet prepare` made of such.
Images = FolderSource | PreparedSource


def open_training(directory: str, *, exif: bool) -> tuple[Images, Images | None]:
    """Opens `directory/train` and the folder beside it that is named as one of `TEST`.

    Both have the classes of `train`; some may have no images in the other. A directory without
    folders of these names holds the class folders themselves. A prepared folder has the parts that
    it was made of.

    Returns:
      The images to learn from, and those to test on, or None if there is no folder for them.

    Raises:
      UserError: if the directory is not laid out like that, or there are classes without training
        images.
    """
    root = _existing(directory)
    if prepared.is_prepared(root):
        parts = prepared.parts_of(root, exif=exif)
        if TRAIN not in parts and "all" not in parts:
            raise UserError(f"{root} was prepared without training images")
        train = PreparedSource(root, TRAIN if TRAIN in parts else "all")
        return train, PreparedSource(root, "test") if "test" in parts else None
    folders = {name.lower(): root / name for name in _folders(root)}
    test = _test_folder(folders)
    if TRAIN not in folders and test is not None:
        raise UserError(
            f"{root} has a folder {test.name} and no folder {TRAIN}; expected {TRAIN}/<class>/* "
            f"and {TEST[0]}/<class>/*"
        )
    read = (folders.get(TRAIN), test)
    others = [one.name for one in folders.values() if one not in read and not _ignored(one.name)]
    if TRAIN not in folders or (
        test is None and others and not _folders(folders[TRAIN])  # a class, as in CIFAR
    ):
        return FolderSource(root, exif=exif), None
    source = FolderSource(folders[TRAIN], exif=exif)
    if others:
        also = f"folders beside it: {listed(others)}"
        source.left_out = ", ".join(filter(None, (source.left_out, also)))
    if test is None:
        return source, None
    return source, FolderSource(test, exif=exif, class_names=source.class_names)


def open_undivided(directory: str, *, exif: bool) -> Images | None:
    """Opens the images of `open_training` from which some are held out for the test.

    Returns:
      All of them, or None if there is a folder for the test, or none to learn from.

    Raises:
      UserError: if there are no images in class folders.
    """
    root = _existing(directory)
    if prepared.is_prepared(root):
        if "test" in prepared.parts_of(root, exif=exif):
            return None
    elif _test_folder({name.lower(): root / name for name in _folders(root)}):
        return None
    return open_training(directory, exif=exif)[0]


def check_side(images: Images, size: int, directory: str) -> None:
    """Checks that images were not prepared smaller than they are used.

    Raises:
      UserError: where they were.
    """
    if isinstance(images, PreparedSource) and images.side < size:
        raise UserError(
            f"data.size is {size}, more than the {images.side} pixels that {directory} was "
            "prepared with (--side)"
        )


def open_test(directory: str, *, exif: bool) -> Images:
    """Opens the images to evaluate on: those of `open_training`, or of class folders alone.

    Its classes are those that have images there.

    Raises:
      UserError: if there are no images in class folders, or only those to train on.
    """
    root = _existing(directory)
    if prepared.is_prepared(root):
        parts = prepared.parts_of(root, exif=exif)
        if "test" not in parts and "all" not in parts:
            raise UserError(f"{root} was prepared without images to test on")
        return PreparedSource(root, "test" if "test" in parts else "all", present=True)
    folders = {name.lower(): root / name for name in _folders(root)}
    test = _test_folder(folders)
    if test is None and TRAIN in folders and _folders(folders[TRAIN]):  # else a class, as in CIFAR
        raise UserError(
            f"{root} has no folder {', '.join(TEST[:-1])} or {TEST[-1]} beside {TRAIN}; "
            f"to evaluate on the training images, name {folders[TRAIN]}"
        )
    return FolderSource(test or root, exif=exif)


def images_in(folder: Path) -> list[Path]:
    """Returns the image files of a folder and of those within it, sorted, the folder's own first.

    Raises:
      OSError: if a folder cannot be read.
    """
    return [folder / file for file in _images(folder, "", [], _LeftOut())]


def parts(directory: str, *, exif: bool) -> dict[str, Images]:
    """Opens all images of a folder, as parts of a prepared one: "train", "test" or "all".

    Raises:
      UserError: as `open_training`, but there need be no images to train on.
    """
    root = _existing(directory)
    folders = {name.lower() for name in _folders(root)}
    if not prepared.is_prepared(root) and TRAIN not in folders and folders & set(TEST):
        return {"test": open_test(directory, exif=exif)}
    train, test = open_training(directory, exif=exif)
    if test is not None:
        return {TRAIN: train, "test": test}
    divided = train.folder != root and train.folder.name.lower() == TRAIN
    return {TRAIN if divided else "all": train}


def found(*given: Images | None) -> str:
    """Returns what was found and what was left out, for a person to read, in one line."""
    sources = [source for source in given if source is not None]
    parts = []
    for source in sources:
        classes = len(source.class_names) - len(source.missing)
        parts.append(
            f"{_counted(len(source), 'image', 'images')} of "
            f"{_counted(classes, 'class', 'classes')} in {source.folder}"
        )
    line = " and ".join(parts)
    for source in sources:
        if source.missing:
            line += f"; no images of {listed(source.missing)} in {source.folder}"
    for source in sources:
        if source.left_out:
            line += f"; left out of {source.folder}: {source.left_out}"
    if isinstance(sources[0], PreparedSource):
        line += f"; {sources[0].how}"
    if sources[0].exif:
        line += "; turned as their EXIF orientation says (data.exif)"
    return line


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


class _LeftOut:
    """Counts what is not read, by reason."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.loose = 0
        self.empty: list[str] = []

    def __str__(self) -> str:
        parts = [
            _counted(count, "file ", "files ")
            + (f"ending in {ending}" if ending else "without an ending")
            for ending, count in sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
        ]
        if len(parts) > 10:
            rest = sum(sorted(self.endings.values())[:-10])
            parts = [*parts[:10], f"{rest} files with other endings"]
        parts += [f"{reason}: {count}" for reason, count in self.reasons.items()]
        if self.loose:
            parts.append(_counted(self.loose, "image", "images") + " outside the class folders")
        if self.empty:
            parts.append(f"class folders without images: {listed(self.empty)}")
        return ", ".join(parts)

    def hint(self) -> str:
        """Returns the end of a sentence that says why there are no images."""
        if self.loose:
            return f"; move its {self.loose} images into one folder per class"
        return f" (it holds {self})" if str(self) else ""


def _classes(folder: Path, left_out: _LeftOut) -> dict[str, list[str]]:
    """Returns the files of each class with images, as paths within the class's folder."""
    files, folders = _entries(folder, left_out)
    left_out.loose = len(files)
    classes = {}
    for name in folders:
        inside = _images(folder / name, "", [folder], left_out)
        if inside:
            classes[name] = inside
        else:
            left_out.empty.append(name)
    return classes


def _images(folder: Path, prefix: str, above: list[Path], left_out: _LeftOut) -> list[str]:
    """Returns the image files of a folder and those within it, sorted, the folder's own first."""
    if any(folder.samefile(other) for other in above):
        left_out.reasons["links to a folder that holds them"] += 1
        return []
    files, folders = _entries(folder, left_out)
    found = [prefix + name for name in files]
    for name in folders:
        found += _images(folder / name, f"{prefix}{name}/", [*above, folder], left_out)
    return found


def _entries(folder: Path, left_out: _LeftOut) -> tuple[list[str], list[str]]:
    """Returns the names of a folder's image files and of its folders, sorted; counts the others."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            if _ignored(entry.name):
                left_out.reasons["hidden files or folders"] += 1
            elif _is(entry.is_dir):
                folders.append(entry.name)
            elif ending not in extensions():
                left_out.endings[ending] += 1
            elif _is(entry.is_file) or entry.is_symlink():  # a link to nothing cannot be opened
                files.append(entry.name)
            else:  # reading a pipe would wait for ever
                left_out.reasons["neither files nor folders"] += 1
    return sorted(files), sorted(folders)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def _existing(directory: str) -> Path:
    root = path_of(directory, "data.dir")
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; expected a folder of images")
    return root


def _folders(root: Path) -> list[str]:
    try:
        # `train` comes after `Train`, and takes its place.
        return sorted(name for name in os.listdir(root) if (root / name).is_dir())
    except OSError as error:
        raise UserError(f"{root} cannot be read ({error})") from error


def _test_folder(folders: dict[str, Path]) -> Path | None:
    return next((folders[name] for name in TEST if name in folders), None)
