"""Fill the generated parts of `docs/` from the code, and write the packaged JSON schemas.

`python tools/build_docs.py` writes; with `--check` it only compares.

A page asks for a part with `<!-- generated: NAME -->`; what stands from there to `<!-- /generated -->` is replaced by
what `PARTS[NAME]` returns. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "main", "rendered"]

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
_PUBLIC = (
    "invarlock.assurance.certification",
    "invarlock.core.api",
    "invarlock.core.runner",
    "invarlock.core.exceptions",
    "invarlock.adapters",
    "invarlock.edits",
    "invarlock.guards",
    "invarlock.eval.data",
    "invarlock.assurance",
    "invarlock.plugins",
    "invarlock.testing",
)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    titles = list(head)
    return "\n".join([line(titles), line("---" for _ in titles), *map(line, rows)])


def _code(value: Any) -> str:
    """Return a value as it is written in YAML or JSON, in backquotes; a dash for nothing."""
    if value is None or value == {}:
        return "—"
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


# --- command line


def _help_of(path: tuple[str, ...]) -> str:
    from invarlock.cli.app import app

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        app([*path, "--help"])
    return printed.getvalue().strip()


def _commands(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        yield (*above, name)
        if hasattr(command, "list_commands"):
            yield from _commands(command, (*above, name))


def _cli() -> str:
    import typer

    from invarlock.cli.app import app

    os.environ["COLUMNS"] = "96"
    parts = [f"## invarlock\n\n```text\n{_help_of(())}\n```"]
    for path in _commands(typer.main.get_command(app)):
        title = "#" * (1 + len(path)) + " " + " ".join(path)
        parts.append(f"{title}\n\n```text\n{_help_of(path)}\n```")
    return "\n\n".join(parts)


def _exit_codes() -> str:
    from invarlock.core.exceptions import EXIT_CODES

    return _table(("Code", "Meaning"), EXIT_CODES.items())


def _codes() -> str:
    from invarlock.core.exceptions import CODES

    return _table(("Code", "Exit code", "Meaning"), ((f"`{code}`", *row) for code, row in CODES.items()))


# --- schemas


def _kind(schema: Mapping[str, Any], page: str = "") -> str:
    """Say in a few words what a JSON Schema allows."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name.strip('_')}](#{name.strip('_').lower()})"
    if "anyOf" in schema:
        kinds = [_kind(part, page) for part in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_kind(schema['prefixItems'][0], page)}"
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}), page)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping to {_kind(schema['additionalProperties'], page)}"
    words = {"object": "mapping", "string": "text", "integer": "whole number", "boolean": "true or false"}
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    bounds = " and ".join(f"{sign} {schema[key]}" for key, sign in signs if key in schema)
    return " ".join(filter(None, [words.get(kind, kind), bounds]))


def _properties(definition: Mapping[str, Any], first: str) -> str:
    required = set(definition.get("required", ()))
    rows = []
    for name, schema in definition.get("properties", {}).items():
        default = "required" if name in required else _code(schema.get("default"))
        rows.append((f"`{name}`", _kind(schema), default, schema.get("description", "")))
    if not any(row[3] for row in rows):
        return _table((first, "Type", "Default"), (row[:3] for row in rows))
    return _table((first, "Type", "Default", "Meaning"), rows)


def _schema_sections(schema: Mapping[str, Any], order: Iterable[str], first: str) -> str:
    parts = []
    for name in order:
        definition = schema["$defs"][name]
        said = inspect.cleandoc(definition.get("description", ""))
        said = "" if "!!! abstract" in said else said
        parts.append("\n\n".join(filter(None, [f"### {name.strip('_')}", said, _properties(definition, first)])))
    return "\n\n".join(parts)


def _config_schema() -> str:
    from invarlock.policy.config import config_schema

    schema = config_schema()
    top = {"properties": {k: v for k, v in schema["properties"].items() if k != "defaults"}}
    sections = [part["$ref"].rpartition("/")[2] for part in top["properties"].values() if "$ref" in part]
    order = [*sections, *(name for name in schema["$defs"] if name not in sections)]
    return _properties(top, "Section") + "\n\n" + _schema_sections(schema, order, "Key")


def _certificate_schema() -> str:
    from invarlock.certificate.schema import json_schema

    schema = json_schema()
    head = "### Certificate\n\n" + _properties(schema, "Field")
    return head + "\n\n" + _schema_sections(schema, sorted(schema["$defs"]), "Field")


# --- tables of the code


def _environment() -> str:
    from invarlock.core.settings import SETTINGS

    rows = []
    for s in SETTINGS:
        kind = "1 or 0" if s.kind == "bool" else ", ".join(s.choices) or {"int": "whole number"}.get(s.kind, s.kind)
        default = {True: "1", False: "0", None: "—"}.get(s.default, s.default)  # type: ignore[arg-type]
        rows.append((f"`{s.name}`", kind.replace("str", "text").replace("float", "number"), default, s.meaning))
    return _table(("Variable", "Value", "Default", "Meaning"), rows)


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
    return out


def _columns(sets: Mapping[str, Mapping[str, Any]]) -> str:
    flat = {name: _flat(values) for name, values in sets.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = ((f"`{key}`", *(_code(values.get(key)) for values in flat.values())) for key in keys)
    return _table(("Key", *flat), rows)


def _tiers() -> str:
    import yaml

    tiers = yaml.safe_load((ROOT / "src/invarlock/data/tiers.yaml").read_text(encoding="utf-8"))["tiers"]
    return _columns(tiers)


def _profiles() -> str:
    from invarlock.policy.resolve import PROFILES, profile_values

    return _columns({name: profile_values(name) for name in PROFILES})


def _guard_defaults() -> str:
    parts = []
    for name in ("invariants", "spectral", "rmt", "variance"):
        module = importlib.import_module(f"invarlock.guards.{name}")
        guard = next(value for value in vars(module).values() if getattr(value, "name", None) == name)
        said = inspect.getdoc(guard) or ""
        rows = ((f"`{key}`", _code(value)) for key, value in _flat(guard.defaults).items())
        parts.append(f"### {name}: keys\n\n{said}\n\n{_table(('Key', 'Default'), rows)}")
    return "\n\n".join(parts)


def _providers() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = []
    for name, target in project["entry-points"]["invarlock.providers"].items():
        provider = _loaded(target)
        options = [
            f"`{field.name}`" + (f" ({field.default})" if field.default else "")
            for field in dataclasses.fields(provider)
        ]
        rows.append((f"`{name}`", provider.kind, ", ".join(options)))
    return _table(("Name", "Kind", "Options (default)"), rows)


def _loaded(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _registered() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = [
        (f"`{name}`", group.rpartition(".")[2].rstrip("s"), f"`{target}`")
        for group, names in project["entry-points"].items()
        if group != "invarlock.providers"  # they have a page of their own, with their options
        for name, target in names.items()
    ]
    return _table(("Name", "Kind", "Class"), rows)


def _extras() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return _table(("Extra", "Brings"), ((f"`{n}`", ", ".join(f"`{d}`" for d in v)) for n, v in extras.items()))


def _doctor_codes() -> str:
    from invarlock.flow.doctor import CODES

    return _table(("Code", "Level", "What it is about"), ((code, *rest) for code, rest in CODES.items()))


def _exceptions() -> str:
    from invarlock.core import exceptions

    tree = str(exceptions.__doc__).split("\n\n")[1]
    return f"```text\n{inspect.cleandoc(tree)}\n```"


def _signature_only() -> str:
    from invarlock.certificate.verify import SIGNATURE_ONLY

    return "\n".join(f"- {line}" for line in SIGNATURE_ONLY)


def _steps() -> str:
    from invarlock.certificate.verify import STEPS

    names = ["schema", *(step.name for step in STEPS)]
    return "\n".join(f"{number}. {name}" for number, name in enumerate(names, 1))


# --- Python API, read from the source so that nothing heavy is imported


def _source(module: str) -> tuple[ast.Module, str]:
    path = ROOT / "src" / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")), module


def _names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _definition(module: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """Find where `name` is defined, following imports within the package."""
    tree, _ = _source(module)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    for node in ast.walk(tree):
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("invarlock")
        if isinstance(node, ast.ImportFrom) and ours and any(alias.name == name for alias in node.names):
            return _definition(str(node.module), name)
    return None


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        arguments = ast.unparse(node.args)
        return re.sub(r"^self(, )?", "", arguments)
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if methods:
        return _signature(methods[0])
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item)]
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return ", ".join(ast.unparse(item) for item in fields) if is_dataclass else ""


def _returns(node: ast.ClassDef | ast.FunctionDef) -> str:
    returned = getattr(node, "returns", None)
    return f" -> {ast.unparse(returned)}" if returned is not None else ""


def _api() -> str:
    parts = []
    for module in _PUBLIC:
        tree, _ = _source(module)
        said = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        parts.append(f"## {module}\n\n{said}")
        for name in _names(tree):
            node = _definition(module, name)
            if node is None:
                parts.append(f"### {name}\n\nA constant.")
                continue
            is_class = isinstance(node, ast.ClassDef)
            shown = f"{'class' if is_class else 'def'} {name}({_signature(node)})"
            doc = ast.get_docstring(node) or ""
            parts.append(f"### {name}\n\n```text\n{_wrapped(shown)}{_returns(node)}\n```\n\n{doc}".rstrip())
            parts += _methods(node)
    return "\n\n".join(parts)


def _methods(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """List the public methods of a class, one bullet each, as one paragraph."""
    found = []
    for item in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            said = (ast.get_docstring(item) or "").split("\n\n")[0].replace("\n", " ")
            found.append(f"- `{item.name}({_signature(item)}){_returns(item)}`" + (f": {said}" if said else ""))
    return ["\n".join(found)] if found else []


def _wrapped(text: str) -> str:
    if len(text) <= 96:
        return text
    head, _, rest = text.partition("(")
    pieces = re.split(r",\s(?![^\[({]*[\])}])", rest[:-1])
    return f"{head}(\n" + "".join(f"    {piece},\n" for piece in pieces) + ")"


PARTS: dict[str, Callable[[], str]] = {
    "api": _api,
    "certificate-schema": _certificate_schema,
    "cli": _cli,
    "config-schema": _config_schema,
    "doctor-codes": _doctor_codes,
    "environment": _environment,
    "codes": _codes,
    "exceptions": _exceptions,
    "exit-codes": _exit_codes,
    "extras": _extras,
    "guard-defaults": _guard_defaults,
    "profiles": _profiles,
    "providers": _providers,
    "registered": _registered,
    "signature-only": _signature_only,
    "tiers": _tiers,
    "verify-steps": _steps,
}


def rendered(text: str, made: dict[str, str]) -> str:
    """Return a page with its generated parts filled in; `made` keeps parts for the next page."""

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in made:
            made[name] = PARTS[name]()
        return f"{match[1]}\n{made[name]}\n\n{match[3]}"

    return _REGION.sub(fill, text)


def _schemas() -> Iterator[tuple[Path, str]]:
    """Yield the packaged JSON schemas: the file and its text."""
    from invarlock.certificate.schema import json_schema
    from invarlock.policy.config import config_schema

    for name, schema, indent in (("certificate", json_schema(), 1), ("config", config_schema(), 2)):
        text = json.dumps(schema, indent=indent, ensure_ascii=False)
        yield ROOT / f"src/invarlock/data/{name}.schema.json", text + "\n"


def main() -> int:
    """Write the pages that are out of date, or, with --check, name them and return 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    check = parser.parse_args().check
    sys.argv = ["invarlock"]
    made: dict[str, str] = {}
    stale = []
    pages = ((page, rendered(page.read_text(encoding="utf-8"), made)) for page in sorted(DOCS.rglob("*.md")))
    for page, new in (*_schemas(), *pages):
        if new != page.read_text(encoding="utf-8"):
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if "torch" in sys.modules:
        raise SystemExit("torch was imported; expected none: the reference must build without it")
    unused = sorted(PARTS.keys() - made.keys())
    if unused:
        raise SystemExit(f"no page uses: {', '.join(unused)}")
    for name in stale:
        print(f"{name} {'is out of date: run python tools/build_docs.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
