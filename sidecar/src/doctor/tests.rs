use std::collections::BTreeSet;

use super::finding::Severity;
use super::*;

/// The page's tables are those that `--reference` prints, so each finding has its severity, its reason and its cure there.
#[test]
fn the_page_has_the_tables_of_all_findings() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/doctor.md");
    let page = std::fs::read_to_string(path).unwrap();
    assert!(
        page.contains(&reference()),
        "docs/doctor.md lacks what `sidecar doctor --reference` prints:\n{}",
        reference()
    );
    assert!(kinds().count() >= 40);
}

#[test]
fn each_code_is_a_name_of_its_own_and_each_text_is_there() {
    let mut codes = BTreeSet::new();
    for kind in kinds() {
        assert!(codes.insert(kind.code), "{} stands twice", kind.code);
        assert!(
            kind.code
                .chars()
                .all(|c| c.is_ascii_lowercase() || c == '-'),
            "{}",
            kind.code
        );
        assert!(kind.why.len() > 20 && kind.cure.len() > 10, "{}", kind.code);
        assert!(
            !kind.why.ends_with('.') && !kind.cure.ends_with('.'),
            "{}",
            kind.code
        );
    }
}

#[test]
fn the_heaviest_finding_decides_the_exit_code() {
    let kind = |severity| kinds().find(|kind| kind.severity == severity).unwrap();
    let (error, warning) = (kind(Severity::Error), kind(Severity::Warning));
    let report = |all: &[&'static Kind], ignore: &[&str]| {
        let mut results = Results::default();
        for kind in all {
            results.add(kind, "seen");
        }
        let ignore: Vec<String> = ignore.iter().map(|code| (*code).to_owned()).collect();
        Report::new(results, &ignore)
    };
    assert_eq!(report(&[], &[]).exit(), Exit::Ok);
    assert_eq!(report(&[warning], &[]).exit(), Exit::Warnings);
    let both = report(&[warning, error], &[]);
    assert_eq!(both.exit(), Exit::Errors);
    let text = both.to_string();
    assert!(
        text.find("error: ").unwrap() < text.find("warning: ").unwrap(),
        "{text}"
    );
    assert!(
        text.ends_with("1 errors, 1 warnings; docs/doctor.md explains each code\n"),
        "{text}"
    );
    let ignored = report(&[warning, error], &[error.code]);
    assert_eq!(ignored.exit(), Exit::Warnings);
    assert_eq!(ignored.json()["ignored"], 1);
    let empty = report(&[warning], &[warning.code]);
    assert_eq!(empty.exit(), Exit::Ok);
    assert!(empty.to_string().ends_with("nothing found (1 ignored)\n"));
}
