//! Runs the fuzz targets over their corpora and the fixtures, as an ordinary test.

#[path = "../../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

/// Name of a fuzz target, and its function.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 8] = [
    ("init", targets::init),
    ("alloc", targets::alloc),
    ("registration", targets::registration),
    ("local", targets::local),
    ("dlist", targets::dlist),
    ("metadata", targets::metadata),
    ("keys", targets::keys),
    ("machines", targets::machines),
];

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

#[test]
fn no_target_dies_of_any_sample() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = files(&root.join("fixtures"));
    for (name, target) in TARGETS {
        let corpus = files(&root.join("fuzz/corpus").join(name));
        assert!(corpus.len() >= 4, "corpus of {name}");
        for file in corpus.iter().chain(&fixtures) {
            target(&fs::read(file).unwrap());
        }
    }
}

/// Changes, removes or adds one byte of each sample, and runs the target with the result.
#[test]
fn no_target_dies_of_a_small_change() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, target) in TARGETS {
        for file in files(&root.join("fuzz/corpus").join(name)) {
            let bytes = fs::read(file).unwrap();
            for at in 0..bytes.len().min(300) {
                for flip in [0x01, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= flip;
                    target(&changed);
                }
                target(&[&bytes[..at], &bytes[at + 1..]].concat());
                target(&[&bytes[..at], &[0], &bytes[at..]].concat());
            }
        }
    }
}

/// The fuzz targets of cargo-fuzz and the targets of this test must be the same.
#[test]
fn the_targets_are_those_of_the_manifest() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let mut declared: Vec<&str> = manifest
        .lines()
        .filter_map(|line| {
            line.strip_prefix("path = \"fuzz_targets/")?
                .strip_suffix(".rs\"")
        })
        .collect();
    declared.sort_unstable();
    let mut here: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    here.sort_unstable();
    assert_eq!(declared, here);
    assert_eq!(files(&root.join("fuzz_targets")).len(), TARGETS.len());
}
