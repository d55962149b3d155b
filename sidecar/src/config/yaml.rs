//! Reads YAML into a tree of scalars that keep their spelling and line.
//!
//! Typed readers of YAML disagree about the meaning of `017`, `1_073_741_824`, `1e9` and `yes` (LMCache reads
//! its file with PyYAML, YAML 1.1). Deserialising into typed fields would lose the spelling and stop at the
//! first mistake. Therefore the file is first read as text, and later the type of each key decides the
//! meaning of its value.

use std::collections::HashMap;

use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, Span};

/// A value with the line where it begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// Line, from 1.
    pub(crate) line: usize,
    /// The value, untyped.
    pub(crate) raw: Raw,
}

/// An untyped value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Raw {
    /// No text, `~` or `null`. The key then counts as not given.
    Null,
    /// A scalar as it is spelled.
    Scalar {
        /// The text without quotes.
        text: String,
        /// True if the text is unquoted in a YAML file, so that YAML's rules for numbers apply.
        plain: bool,
    },
    /// A sequence.
    List(Vec<Node>),
    /// A mapping.
    Map(Vec<Entry>),
}

/// One key of a mapping.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// The key.
    pub(crate) key: String,
    /// Line of the key, from 1.
    pub(crate) line: usize,
    /// The key's value.
    pub(crate) value: Node,
}

/// A file that is not one YAML mapping.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{what}")]
pub(crate) struct YamlError {
    /// Line, from 1.
    pub(crate) line: usize,
    /// The mistake, in a few words.
    pub(crate) what: String,
}

impl Raw {
    /// Makes a value from text that is not YAML: a flag or an environment variable.
    pub(crate) fn outside(text: &str) -> Self {
        Self::Scalar {
            text: text.to_owned(),
            plain: false,
        }
    }

    /// Returns the value in one line, for messages.
    pub(crate) fn show(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Scalar { text, .. } => text.clone(),
            Self::List(items) => {
                let items: Vec<_> = items.iter().map(|n| n.raw.show()).collect();
                format!("[{}]", items.join(", "))
            }
            Self::Map(entries) => {
                let keys: Vec<_> = entries.iter().map(|e| e.key.as_str()).collect();
                format!("{{{}}}", keys.join(", "))
            }
        }
    }
}

/// Reads one document that is a mapping. An empty document is an empty mapping.
///
/// # Errors
/// The first place where the text is not YAML, is not a mapping, or exceeds a limit.
pub(crate) fn parse(text: &str) -> Result<Vec<Entry>, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError {
            line: 1,
            what: format!(
                "the file has {} bytes, more than {MAX_BYTES}: is it a configuration?",
                text.len()
            ),
        });
    }
    let mut tree = Tree::new(text);
    tree.skip_start()?;
    let Some(node) = tree.document()? else {
        return Ok(Vec::new());
    };
    match node.raw {
        Raw::Map(entries) => Ok(entries),
        Raw::Null => Ok(Vec::new()),
        other => Err(YamlError {
            line: node.line,
            what: format!("expected `key: value` lines, found `{}`", other.show()),
        }),
    }
}

/// Builds nodes from the parser's events.
struct Tree<'a> {
    parser: Parser<'a, serde_saphyr::granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    line: usize,
}

impl<'a> Tree<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            parser: Parser::new_from_str(text),
            anchors: HashMap::new(),
            nodes: 0,
            line: 1,
        }
    }

    fn fail<T>(&self, what: impl Into<String>) -> Result<T, YamlError> {
        Err(YamlError {
            line: self.line,
            what: what.into(),
        })
    }

    fn event(&mut self) -> Result<Event<'a>, YamlError> {
        loop {
            match self.parser.next_event() {
                Some(Ok((Event::Comment(..), _))) => {}
                Some(Ok((event, span))) => {
                    self.line = line_of(&span);
                    return Ok(event);
                }
                Some(Err(error)) => {
                    return Err(YamlError {
                        line: error.marker().line(),
                        what: format!("not YAML: {}", error.info()),
                    });
                }
                None => return Ok(Event::StreamEnd),
            }
        }
    }

    fn skip_start(&mut self) -> Result<(), YamlError> {
        match self.event()? {
            Event::StreamStart => Ok(()),
            _ => self.fail("not YAML: no start of the stream"),
        }
    }

    fn document(&mut self) -> Result<Option<Node>, YamlError> {
        match self.event()? {
            Event::StreamEnd => return Ok(None),
            Event::DocumentStart(..) => {}
            _ => return self.fail("not YAML: no start of the document"),
        }
        let first = self.event()?;
        let node = self.node(first, 0)?;
        match self.event()? {
            Event::DocumentEnd => {}
            _ => return self.fail("not YAML: no end of the document"),
        }
        match self.event()? {
            Event::StreamEnd => Ok(Some(node)),
            _ => self.fail("a second YAML document begins here; a configuration is one document"),
        }
    }

    fn node(&mut self, event: Event<'a>, depth: usize) -> Result<Node, YamlError> {
        let line = self.line;
        self.count(1)?;
        if depth > MAX_DEPTH {
            return self.fail(format!("nested deeper than {MAX_DEPTH}"));
        }
        let (raw, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                let raw = if plain && is_null(&text) {
                    Raw::Null
                } else {
                    Raw::Scalar {
                        text: text.into_owned(),
                        plain,
                    }
                };
                (raw, anchor)
            }
            Event::SequenceStart(_, anchor, _) => (self.list(depth)?, anchor),
            Event::MappingStart(_, anchor, _) => (self.map(depth)?, anchor),
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id).cloned() else {
                    return self.fail("an alias that refers to itself");
                };
                self.count(weight(&node.raw))?;
                return Ok(Node { line, ..node });
            }
            _ => return self.fail("not YAML: expected a value"),
        };
        let node = Node { line, raw };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Raw, YamlError> {
        let mut items = Vec::new();
        loop {
            match self.event()? {
                Event::SequenceEnd => return Ok(Raw::List(items)),
                event => items.push(self.node(event, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Raw, YamlError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut merged = Vec::new();
        loop {
            let event = self.event()?;
            if event == Event::MappingEnd {
                break;
            }
            let line = self.line;
            let key = match self.node(event, depth + 1)?.raw {
                Raw::Scalar { text, .. } => text,
                other => return self.fail(format!("`{}` cannot be a key", other.show())),
            };
            let event = self.event()?;
            let value = self.node(event, depth + 1)?;
            if key == "<<" {
                match value.raw {
                    Raw::Map(below) => merged.extend(below),
                    _ => return self.fail("`<<` needs an alias of a mapping"),
                }
                continue;
            }
            if let Some(before) = entries.iter().find(|e| e.key == key) {
                return Err(YamlError {
                    line,
                    what: format!("`{key}` is already set on line {}", before.line),
                });
            }
            entries.push(Entry { key, line, value });
        }
        for entry in merged {
            if entries.iter().all(|e| e.key != entry.key) {
                entries.push(entry);
            }
        }
        Ok(Raw::Map(entries))
    }

    fn count(&mut self, nodes: usize) -> Result<(), YamlError> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return self.fail(format!("more than {MAX_NODES} values"));
        }
        Ok(())
    }
}

fn line_of(span: &Span) -> usize {
    span.start.line()
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

fn weight(raw: &Raw) -> usize {
    match raw {
        Raw::Null | Raw::Scalar { .. } => 1,
        Raw::List(items) => 1 + items.iter().map(|n| weight(&n.raw)).sum::<usize>(),
        Raw::Map(entries) => 1 + entries.iter().map(|e| weight(&e.value.raw)).sum::<usize>(),
    }
}

/// Largest file. LMCache's longest example has 2 KiB; the limit keeps the sidecar from parsing a large file
/// that the user named by mistake.
const MAX_BYTES: usize = 1 << 20;
/// Largest number of values. An alias counts as all values that it expands to, so that a small file cannot
/// expand without end.
const MAX_NODES: usize = 10_000;
const MAX_DEPTH: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        let shown = match parse(text) {
            Ok(entries) => entries
                .iter()
                .map(|e| format!("{}:{}={}", e.line, e.key, e.value.raw.show()))
                .collect::<Vec<_>>()
                .join(" "),
            Err(e) => format!("line {}: {e}", e.line),
        };
        assert_eq!(shown, expect, "{text:?}");
    }

    #[test]
    fn keeps_the_spelling_and_the_lines() {
        check("", "");
        check("# only a comment\n", "");
        check("~\n", "");
        check(
            "a: 1_073_741_824\nb: 017\n\nc: yes # no\n",
            "1:a=1_073_741_824 2:b=017 4:c=yes",
        );
        check("a: \"017\"\nb: NULL\nc:\n", "1:a=017 2:b=null 3:c=null");
        check(
            "p: [7300, 7301]\nq:\n  - 1\n  - 2\n",
            "1:p=[7300, 7301] 2:q=[1, 2]",
        );
        check("sidecar:\n  id: x\n", "1:sidecar={id}");
    }

    #[test]
    fn expands_aliases_and_merges_within_the_limit() {
        check("a: &x 5\nb: *x\n", "1:a=5 2:b=5");
        check(
            "a: &x {k: 1, l: 2}\n<<: *x\nk: 3\n",
            "1:a={k, l} 3:k=3 1:l=2",
        );
        let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for i in 1..8 {
            let before = format!("*a{}", i - 1);
            bomb += &format!("a{i}: &a{i} [{}]\n", vec![before; 10].join(","));
        }
        check(&bomb, "line 4: more than 10000 values");
    }

    #[test]
    fn names_the_line_of_a_mistake() {
        check("a: 1\nb: 2\na: 3\n", "line 3: `a` is already set on line 1");
        check("- 1\n", "line 1: expected `key: value` lines, found `[1]`");
        check(
            "a: 1\n---\nb: 2\n",
            "line 2: a second YAML document begins here; a configuration is one document",
        );
        assert_eq!(parse("a: 1\nb: [1, 2\n").unwrap_err().line, 2);
        let deep = format!("a: {}1{}\n", "[".repeat(20), "]".repeat(20));
        check(&deep, "line 1: nested deeper than 16");
    }
}
