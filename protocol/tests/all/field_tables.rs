//! Checks that the tables of messages and fields in PROTOCOL.md agree with the documentation of the
//! Rust types. `UPDATE=1 cargo test -p pd-protocol --test all field_tables` writes these tables.
//!
//! The sources are read line by line, which is enough for code that rustfmt has formatted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

const SOURCES: [&str; 6] = [
    "layout.rs",
    "groups.rs",
    "message.rs",
    "keep.rs",
    "local.rs",
    "registration.rs",
];
const BEGIN: &str = "<!-- generated: ";
const END: &str = "<!-- end -->";

/// A struct or an enum of the sources.
#[derive(Debug)]
struct Item {
    name: String,
    attributes: String,
    members: Vec<Member>,
}

/// A field of a struct, or a variant of an enum.
#[derive(Debug)]
struct Member {
    name: String,
    /// Rust type; empty for a variant without data.
    of: String,
    docs: String,
    attributes: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the public structs and enums of all sources, in the order of the sources.
fn items() -> Vec<Item> {
    let read = |name| fs::read_to_string(root().join("protocol/src").join(name)).unwrap();
    SOURCES.iter().flat_map(|name| parse(&read(name))).collect()
}

fn parse(source: &str) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    let (mut docs, mut attributes) = (String::new(), String::new());
    let (mut inside, mut attribute_goes_on) = (false, false);
    for line in source.lines() {
        let text = line.trim();
        if attribute_goes_on || text.starts_with("#[") {
            attributes.push_str(text);
            attribute_goes_on = !text.ends_with(']');
            continue;
        }
        if let Some(doc) = text.strip_prefix("///") {
            docs.push_str(doc);
            continue;
        }
        if let Some(name) = opening(line) {
            inside = true;
            items.push(Item {
                name: name.to_owned(),
                attributes: attributes.clone(),
                members: Vec::new(),
            });
        } else if line == "}" {
            inside = false;
        } else if inside && let Some((name, of)) = member(text) {
            let item = items.last_mut().expect("an item is open");
            item.members.push(Member {
                name: name.to_owned(),
                of: of.to_owned(),
                docs: docs.trim().to_owned(),
                attributes: attributes.clone(),
            });
        }
        docs.clear();
        attributes.clear();
    }
    items
}

/// Returns the name of the struct or enum that begins in this line.
fn opening(line: &str) -> Option<&str> {
    let rest = line
        .strip_prefix("pub struct ")
        .or_else(|| line.strip_prefix("pub enum "))?;
    rest.strip_suffix(" {")
}

/// Returns name and type of the field or variant in this line.
fn member(text: &str) -> Option<(&str, &str)> {
    let text = text.strip_suffix(',')?;
    if let Some(field) = text.strip_prefix("pub ") {
        return field.split_once(": ");
    }
    match text.strip_suffix(')') {
        Some(variant) => variant.split_once('('),
        None => Some((text, "")),
    }
}

/// Returns the type on the wire. A struct becomes a link to its own table.
fn wire_type(of: &str, words: &BTreeMap<String, String>) -> String {
    let inner = |prefix| {
        of.strip_prefix(prefix)
            .and_then(|rest: &str| rest.strip_suffix('>'))
    };
    if let Some(of) = inner("Option<") {
        return wire_type(of, words);
    }
    if let Some(of) = inner("Vec<") {
        return format!("list of {}", wire_type(of, words));
    }
    match of {
        "bool" | "u16" | "u32" | "u64" | "i64" => of.to_owned(),
        "Epoch" | "LeaseId" => "u64".to_owned(),
        "SlotOf" => "u32".to_owned(),
        "String" | "RequestId" | "Token" => "text".to_owned(),
        "ByteBuf" => "bin".to_owned(),
        "Reason" => "[reason](#reasons)".to_owned(),
        of if words.contains_key(of) => words[of].clone(),
        of => format!("[`{of}`](#{})", of.to_lowercase()),
    }
}

/// Writes links of rustdoc (``[`AllocX::seq`]``) as plain code (`` `AllocX.seq` ``).
fn plain(docs: &str) -> String {
    let mut text = String::new();
    for (index, part) in docs.split("[`").enumerate() {
        let (link, rest) = part.split_once("`]").unwrap_or(("", part));
        if index == 0 || link.is_empty() {
            text.push_str(part);
            continue;
        }
        let name = match link.split_once("::") {
            Some((set, message)) if set.starts_with("To") => message.to_owned(),
            _ => link.replace("EngineHello", "Hello").replace("::", "."),
        };
        write!(text, "`{name}`{rest}").expect("writing to a string");
    }
    text.replace('|', "\\|")
}

/// Returns the table of a struct's fields.
fn fields(item: &Item, words: &BTreeMap<String, String>) -> String {
    // The structs with a field `x` are LMCache's, and so are the two structs of the query port.
    let lmcache = item.members.iter().any(|m| m.name == "x") || item.name.starts_with("CacheQuery");
    let mut table =
        "| field | type | meaning | if absent | since |\n|---|---|---|---|---|\n".to_owned();
    for field in &item.members {
        let at = format!("{}::{}", item.name, field.name);
        let optional = field.attributes.contains("default") || field.of.starts_with("Option<");
        let (meaning, absent) = match field.docs.split_once("Absent: ") {
            Some((meaning, absent)) if optional => (meaning.trim(), plain(absent)),
            None if !optional => (field.docs.as_str(), "–".to_owned()),
            Some(_) => panic!("{at} is required, but its documentation has \"Absent: \""),
            None => {
                panic!("{at} is optional: its documentation needs \"Absent: \" and the meaning")
            }
        };
        assert!(!meaning.is_empty(), "{at} needs documentation");
        let since = if lmcache && field.name != "x" {
            "LMCache"
        } else {
            "v1"
        };
        let (meaning, since) = match meaning.split_once(" Since v") {
            Some((meaning, version)) => (meaning, format!("v{}", version.trim_end_matches('.'))),
            None => (meaning, since.to_owned()),
        };
        let of = wire_type(&field.of, words);
        let (name, meaning, absent) = (&field.name, plain(meaning), absent.trim_end_matches('.'));
        writeln!(
            table,
            "| `{name}` | {of} | {meaning} | {absent} | {since} |"
        )
        .expect("a string");
    }
    table
}

/// Returns the table of the messages of one set.
fn messages(item: &Item) -> String {
    let mut table = "| message | meaning |\n|---|---|\n".to_owned();
    for message in &item.members {
        let (name, meaning) = (&message.name, plain(&message.docs));
        assert!(
            !meaning.is_empty(),
            "{}::{name} needs documentation",
            item.name
        );
        writeln!(table, "| `{name}` | {meaning} |").expect("a string");
    }
    table
}

/// Returns all tables, each with the name of its Rust type.
fn tables(items: &[Item]) -> Vec<(&str, String)> {
    let is_words = |item: &Item| item.attributes.contains("rename_all = \"lowercase\"");
    let words = items
        .iter()
        .filter(|item| is_words(item))
        .map(|item| {
            let names: Vec<_> = item
                .members
                .iter()
                .map(|word| format!("`{}`", word.name.to_lowercase()))
                .collect();
            (item.name.clone(), names.join(" or "))
        })
        .collect();
    let table = |item| match item {
        item if is_words(item) => None,
        item if item.attributes.contains("tag = \"type\"") => Some((&*item.name, messages(item))),
        item => Some((&*item.name, fields(item, &words))),
    };
    items.iter().filter_map(table).collect()
}

#[test]
fn the_tables_are_those_of_the_types() {
    let path = root().join("PROTOCOL.md");
    let before = fs::read_to_string(&path).unwrap();
    let mut document = before.clone();
    let items = items();
    let tables = tables(&items);
    for (name, table) in &tables {
        let begin = format!("{BEGIN}{name} -->\n");
        let place = document.find(&begin).map(|at| at + begin.len());
        let end = place.and_then(|at| Some(at + document[at..].find(END)?));
        let (Some(from), Some(to)) = (place, end) else {
            panic!("PROTOCOL.md has no place for the table of {name}: add {begin:?} and {END:?}");
        };
        document.replace_range(from..to, table);
    }
    assert_eq!(
        document.matches(BEGIN).count(),
        tables.len(),
        "PROTOCOL.md has the table of a type twice, or of a type that does not exist"
    );
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, document).unwrap();
        return;
    }
    let differs = |(old, new): &(&str, &str)| old != new;
    let first = before.lines().zip(document.lines()).find(differs);
    assert!(
        before == document,
        "the message types have changed. Raise protocol::VERSION if older peers would misunderstand, \
         extend protocol/fixtures/messages.json, and write the tables with UPDATE=1 cargo test -p \
         pd-protocol --test all field_tables. First difference: {first:#?}"
    );
}

#[test]
fn the_reader_of_the_sources_finds_all_fields() {
    let items = items();
    let fields: usize = items.iter().map(|item| item.members.len()).sum();
    assert!(fields > 180, "only {fields} fields and messages found");
    let sample = "/// Doc.\n#[derive(A)]\npub struct S {\n    /// Text. Absent: none,\n    /// see [`T::u`].\n    \
                  #[serde(default)]\n    pub name: Option<String>,\n}\n";
    let [item] = &parse(sample)[..] else {
        panic!("one struct");
    };
    let row = "| `name` | text | Text. | none, see `T.u` | v1 |\n";
    assert!(fields_of(item).ends_with(row), "{}", fields_of(item));
}

fn fields_of(item: &Item) -> String {
    fields(item, &BTreeMap::new())
}
