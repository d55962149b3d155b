//! Lists the transports. A new transport is a folder, its `mod` line, and a name in the table below.

use std::fmt;

use super::spec::Kind;
use super::{cuda_ipc, nixl, tcp};

/// Declares the table and the texts that list the names. The name of a transport is the name of its folder, and
/// each folder has a `KIND`.
macro_rules! transports {
    ($($name:ident),+; $last:ident) => {
        /// All transports, best first.
        static KINDS: &[Kind] = &[$($name::KIND,)+ $last::KIND];

        /// The values of the key `transport`, as a list within a sentence.
        pub(crate) const CHOICES: &str =
            concat!("auto", $(", ", stringify!($name),)+ " or ", stringify!($last));

        /// The values of the flag `--transport`, in the form that help texts use.
        pub(crate) const FLAG_CHOICES: &str =
            concat!("auto", $("|", stringify!($name),)+ "|", stringify!($last));

        #[cfg(test)]
        const FOLDERS: &[&str] = &[$(stringify!($name),)+ stringify!($last)];
    };
}

// CUDA IPC is first. Over NVLink, CUDA IPC is a little faster than NIXL, which uses the same kind of copies
// internally (docs/benchmarks.md). If CUDA IPC cannot reach the receiver's memory, it reports an error, and
// does not stage the bytes through sockets. NIXL is second. NIXL can use NVLink, RDMA and shared memory; with
// only TCP it is about as fast as the built-in transport. The last name follows a semicolon, because texts have
// "or" before it.
transports! { cuda_ipc, nixl; tcp }

/// Returns all transports, best first.
pub(crate) fn all() -> impl DoubleEndedIterator<Item = Kind> {
    KINDS.iter().copied()
}

/// Returns the names of all transports for `--version`, in two groups: loaded at run time, and built in.
pub(crate) fn origins() -> String {
    let of = |loaded| {
        let kinds = all().filter(|kind| kind.0.library.is_some() == loaded);
        kinds.map(Kind::as_str).collect::<Vec<_>>().join(", ")
    };
    let (loaded, built_in) = (of(true), of(false));
    format!("{loaded} (loaded at run time, if found), {built_in} (built in)")
}

/// The setting `transport`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Choice {
    /// The best transport that both sides have.
    #[default]
    Auto,
    /// This transport or none.
    Only(Kind),
}

impl Choice {
    /// Returns the choice with this name; `None` if there is no such transport.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            AUTO => Some(Self::Auto),
            _ => all().find(|kind| kind.as_str() == name).map(Self::Only),
        }
    }

    /// Returns the name in configurations and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => AUTO,
            Self::Only(kind) => kind.as_str(),
        }
    }

    /// Returns the transports that may be used, best first.
    pub(crate) fn kinds(self) -> impl DoubleEndedIterator<Item = Kind> {
        all().filter(move |kind| self == Self::Auto || self == Self::Only(*kind))
    }

    /// Returns true if one of the transports loads UCX.
    pub(crate) fn may_use_ucx(self) -> bool {
        self.kinds().any(|kind| kind.0.uses_ucx)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

const AUTO: &str = "auto";

#[cfg(test)]
mod tests {
    use protocol::record::TRANSPORTS;

    use super::*;

    #[test]
    fn a_transport_has_the_name_of_its_folder() {
        let names: Vec<_> = all().map(Kind::as_str).collect();
        assert_eq!(names, FOLDERS);
        // The proxy shows a transport to people only if the protocol's list has it.
        assert_eq!(names, TRANSPORTS);
        for name in names {
            assert_eq!(Choice::named(name).unwrap().as_str(), name);
        }
        assert_eq!(Choice::named("auto"), Some(Choice::Auto));
        assert_eq!(Choice::named("carrier pigeon"), None);
    }
}
