//! Names the protections of KV on the wire.

/// The protection of KV on the wire, from the weakest to the strongest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Protection {
    /// A write needs only its lease's random id.
    #[default]
    Plain,
    /// The sender proves its key. Every byte is authenticated, and none is encrypted.
    Authenticated,
    /// The sender proves its key. Every byte is authenticated and encrypted.
    Sealed,
}

impl Protection {
    /// All values, from the weakest to the strongest.
    pub(crate) const ALL: [Self; 3] = [Self::Plain, Self::Authenticated, Self::Sealed];

    /// Returns the word for configurations.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Authenticated => "authenticated",
            Self::Sealed => "sealed",
        }
    }

    /// Returns the code on the wire.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Authenticated => 1,
            Self::Sealed => 2,
        }
    }

    /// Returns the protection of a code on the wire; `None` for an unknown code.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.code() == code)
    }
}
