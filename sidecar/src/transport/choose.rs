//! Chooses the wire between a pair of sidecars and says why.

use std::fmt;

use protocol::Reason;
use protocol::message::Advert;

use super::Kind;
use super::spec::NoAddress;
use super::table::{self, Choice};

/// The wire that was chosen for one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// The kind of the wire.
    pub(crate) kind: Kind,
    /// The address in the receiver's advert; `None` if the wire needs no address.
    pub(crate) address: Option<String>,
    /// The reason for the choice, for logs and the status page.
    pub(crate) why: String,
}

/// The reason why no wire serves both sides.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(crate) struct NoWire {
    text: String,
}

impl NoWire {
    /// Returns the reason for counters and messages.
    #[expect(clippy::unused_self, reason = "callers ask the error, not its type")]
    pub(crate) fn reason(&self) -> Reason {
        Reason::NoLink
    }
}

/// The facts about both sides that decide the choice.
#[derive(Clone, Copy)]
pub(crate) struct Sides<'a> {
    /// The wires of this process.
    pub(crate) ours: &'a [Kind],
    /// The adverts in the receiver's hello; `None` for an LMCache peer, which sends no hello.
    pub(crate) theirs: Option<&'a [Advert]>,
    /// The name under which this process reached the receiver's init port.
    pub(crate) host: &'a str,
    /// Checks that this process's wire reaches the receiver of an advert; the error says why it does not.
    pub(crate) reaches: &'a dyn Fn(Kind, &Advert) -> Result<(), String>,
    /// Returns the reason why a wire of this process is only the last choice; `None` if it is a normal choice.
    pub(crate) poor: &'a dyn Fn(Kind) -> Option<String>,
}

/// Chooses the wire for a link.
/// The order of the table decides, but a wire that is only a last choice comes after all others.
///
/// # Errors
/// No wire can be used. The text says what is missing on which side.
pub(crate) fn choose(wanted: Choice, sides: Sides<'_>) -> Result<Chosen, NoWire> {
    if let Choice::Only(kind) = wanted {
        return match usable(kind, sides) {
            Ok(address) => Ok(Chosen {
                kind,
                address,
                why: "configured".to_owned(),
            }),
            Err(lack) => Err(NoWire {
                text: format!("transport {kind} is configured, but {lack}"),
            }),
        };
    }
    // Wires that are a last choice come after all others. The other wires keep their order, because the sort is
    // stable.
    let mut lacks = Vec::new();
    let mut order: Vec<(Kind, Option<String>)> = table::all()
        .map(|kind| (kind, (sides.poor)(kind)))
        .collect();
    order.sort_by_key(|(_, poor)| poor.is_some());
    let poor: Vec<String> = order.iter().filter_map(|(_, poor)| poor.clone()).collect();
    for (kind, why) in order {
        match usable(kind, sides) {
            Ok(address) => {
                if why.is_none() && sides.ours.len() > 1 {
                    lacks.extend(poor);
                }
                let why = match &lacks[..] {
                    [] => format!("auto: both sides have {kind}"),
                    lacks => format!("auto: {}", lacks.join("; ")),
                };
                return Ok(Chosen { kind, address, why });
            }
            // A host without GPU buffers needs no wire between GPUs, so the text does not report that this wire
            // is absent.
            Err(Lack::Here(kind)) if kind.needs_gpu() => {}
            Err(lack) => lacks.push(lack.to_string()),
        }
    }
    let text = format!("no wire serves both sides: {}", lacks.join("; "));
    Err(NoWire { text })
}

/// The reason why a wire cannot be used for a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Lack {
    Here(Kind),
    There(Kind),
    LmCache(Kind),
    BadAddress(Kind, String),
    OutOfReach(Kind, String),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(kind) => write!(f, "this side has no {kind}"),
            Self::There(kind) => write!(f, "the receiver offers no {kind}"),
            Self::LmCache(kind) => write!(f, "the receiver is LMCache, which has no {kind}"),
            Self::BadAddress(kind, address) => {
                write!(
                    f,
                    "the receiver offers {kind} at {address:?}, which is no host:port"
                )
            }
            Self::OutOfReach(kind, why) => write!(f, "no {kind}: {why}"),
        }
    }
}

/// Returns the address of a wire if both sides have the wire and it reaches the receiver.
fn usable(kind: Kind, sides: Sides<'_>) -> Result<Option<String>, Lack> {
    if !sides.ours.contains(&kind) {
        return Err(Lack::Here(kind));
    }
    let Some(theirs) = sides.theirs else {
        return if kind.0.lmcache_has_it {
            Ok(None)
        } else {
            Err(Lack::LmCache(kind))
        };
    };
    let mut offers = theirs.iter().filter(|advert| advert.kind == kind.as_str());
    let Some(offer) = offers.next() else {
        return Err(Lack::There(kind));
    };
    (sides.reaches)(kind, offer).map_err(|why| Lack::OutOfReach(kind, why))?;
    (kind.0.address)(offer, sides.host).map_err(|error| match error {
        NoAddress::Absent => Lack::There(kind),
        NoAddress::Invalid => Lack::BadAddress(kind, offer.address.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{cuda_ipc, nixl, tcp};

    const BOTH: &[Kind] = &[nixl::KIND, tcp::KIND];
    const NIXL: Choice = Choice::Only(nixl::KIND);
    const TCP: Choice = Choice::Only(tcp::KIND);

    /// Checks a choice. `theirs` lists the receiver's wires: `nixl` and `tcp@ADDRESS`, or `lmcache` alone.
    fn check(
        wanted: Choice,
        ours: &[Kind],
        theirs: &str,
        expect: Result<(Kind, &str, &str), &str>,
    ) {
        check_to("known", wanted, ours, theirs, expect);
    }

    fn check_to(
        host: &str,
        wanted: Choice,
        ours: &[Kind],
        theirs: &str,
        expect: Result<(Kind, &str, &str), &str>,
    ) {
        let adverts: Vec<Advert> = theirs
            .split_whitespace()
            .map(|word| {
                let (kind, address) = word.split_once('@').unwrap_or((word, ""));
                Advert {
                    kind: kind.to_owned(),
                    address: address.to_owned(),
                }
            })
            .collect();
        let offered = (theirs != "lmcache").then_some(&adverts[..]);
        let sides = Sides {
            ours,
            theirs: offered,
            host,
            reaches: &|kind, advert| {
                if kind == cuda_ipc::KIND && advert.address == "far" {
                    return Err("too far".to_owned());
                }
                Ok(())
            },
            poor: &|kind| {
                (kind == nixl::KIND && host == "no rdma").then(|| "nixl is slow here".to_owned())
            },
        };
        let got = choose(wanted, sides);
        match (&got, expect) {
            (Ok(chosen), Ok((kind, address, why))) => {
                assert_eq!(chosen.kind, kind, "{theirs}");
                assert_eq!(chosen.address.as_deref().unwrap_or(""), address, "{theirs}");
                assert_eq!(chosen.why, why, "{theirs}");
            }
            (Err(error), Err(text)) => assert_eq!(error.to_string(), text, "{theirs}"),
            _ => panic!("{theirs}: {got:?} instead of {expect:?}"),
        }
    }

    #[test]
    fn auto_prefers_nixl_and_says_why_not() {
        let nixl = Ok((nixl::KIND, "", "auto: both sides have nixl"));
        check(Choice::Auto, BOTH, "nixl tcp@h:1", nixl);
        check(Choice::Auto, BOTH, "tcp@h:1 nixl", nixl);
        check(Choice::Auto, BOTH, "lmcache", nixl);
        check(Choice::Auto, &[nixl::KIND], "rdma2 nixl", nixl);
        check(
            Choice::Auto,
            &[tcp::KIND],
            "nixl tcp@h:1",
            Ok((tcp::KIND, "h:1", "auto: this side has no nixl")),
        );
        check(
            Choice::Auto,
            BOTH,
            "tcp@h:1",
            Ok((tcp::KIND, "h:1", "auto: the receiver offers no nixl")),
        );
        check(
            Choice::Auto,
            &[tcp::KIND],
            "nixl",
            Err("no wire serves both sides: this side has no nixl; the receiver offers no tcp"),
        );
        check(
            Choice::Auto,
            &[tcp::KIND],
            "lmcache",
            Err(
                "no wire serves both sides: this side has no nixl; the receiver is LMCache, which \
                 has no tcp",
            ),
        );
        check(
            Choice::Auto,
            &[],
            "nixl tcp@h:1",
            Err("no wire serves both sides: this side has no nixl; this side has no tcp"),
        );
    }

    #[test]
    fn cuda_ipc_goes_first_where_it_reaches() {
        let all = &[cuda_ipc::KIND, nixl::KIND, tcp::KIND];
        let check = |theirs, expect| check(Choice::Auto, all, theirs, expect);
        let near = "auto: both sides have cuda_ipc";
        check("tcp@h:1 nixl cuda_ipc@x", Ok((cuda_ipc::KIND, "x", near)));
        check(
            "cuda_ipc@far nixl",
            Ok((nixl::KIND, "", "auto: no cuda_ipc: too far")),
        );
        let both = "auto: the receiver offers no cuda_ipc; the receiver offers no nixl";
        check("tcp@h:1", Ok((tcp::KIND, "h:1", both)));
        let far = "transport cuda_ipc is configured, but no cuda_ipc: too far";
        let only = Choice::Only(cuda_ipc::KIND);
        super::tests::check(only, all, "cuda_ipc@far nixl", Err(far));
        let none = "transport cuda_ipc is configured, but this side has no cuda_ipc";
        super::tests::check(only, BOTH, "cuda_ipc@x", Err(none));
    }

    #[test]
    fn a_poor_wire_is_the_last_choice() {
        let check = |wanted, ours: &[Kind], theirs, expect| {
            check_to("no rdma", wanted, ours, theirs, expect);
        };
        let tcp = Ok((tcp::KIND, "h:1", "auto: nixl is slow here"));
        check(Choice::Auto, BOTH, "nixl tcp@h:1", tcp);
        let none = "auto: the receiver offers no tcp";
        check(Choice::Auto, BOTH, "nixl", Ok((nixl::KIND, "", none)));
        check(
            NIXL,
            BOTH,
            "nixl tcp@h:1",
            Ok((nixl::KIND, "", "configured")),
        );
    }

    #[test]
    fn a_configured_wire_is_used_or_refused_never_replaced() {
        check(
            NIXL,
            BOTH,
            "nixl tcp@h:1",
            Ok((nixl::KIND, "", "configured")),
        );
        check(NIXL, BOTH, "lmcache", Ok((nixl::KIND, "", "configured")));
        check(
            TCP,
            BOTH,
            "nixl tcp@h:1",
            Ok((tcp::KIND, "h:1", "configured")),
        );
        for (wanted, ours, theirs, text) in [
            (
                NIXL,
                BOTH,
                "tcp@h:1",
                "transport nixl is configured, but the receiver offers no nixl",
            ),
            (
                NIXL,
                &[tcp::KIND][..],
                "nixl",
                "transport nixl is configured, but this side has no nixl",
            ),
            (
                TCP,
                BOTH,
                "nixl",
                "transport tcp is configured, but the receiver offers no tcp",
            ),
            (
                TCP,
                BOTH,
                "nixl tcp",
                "transport tcp is configured, but the receiver offers no tcp",
            ),
            (
                TCP,
                &[nixl::KIND][..],
                "tcp@h:1",
                "transport tcp is configured, but this side has no tcp",
            ),
            (
                TCP,
                BOTH,
                "lmcache",
                "transport tcp is configured, but the receiver is LMCache, which has no tcp",
            ),
        ] {
            check(wanted, ours, theirs, Err(text));
        }
    }

    #[test]
    fn addresses_are_completed_and_checked() {
        for (offer, expect) in [
            ("tcp@h:1", "h:1"),
            ("tcp@:7600", "known:7600"),
            ("tcp@[::1]:7600", "[::1]:7600"),
        ] {
            check(TCP, BOTH, offer, Ok((tcp::KIND, expect, "configured")));
        }
        for address in ["h", "h:", "h:0", "h:65536", ":"] {
            let text = format!(
                "transport tcp is configured, but the receiver offers tcp at {address:?}, which is \
                 no host:port"
            );
            check(TCP, BOTH, &format!("tcp@{address}"), Err(&text));
        }
    }
}
