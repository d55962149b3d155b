//! Chooses the wire between a pair of sidecars and says why.

use std::fmt;

use protocol::Reason;
use protocol::message::Advert;

use super::Kind;

/// The setting `transport`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Wanted {
    /// The best wire that both sides have.
    #[default]
    Auto,
    /// This wire or none.
    Only(Kind),
}

/// The wire that was chosen for one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// The kind of the wire.
    pub(crate) kind: Kind,
    /// The address in the receiver's advert, `host:port` for [`Kind::Tcp`]; `None` for NIXL, for which the
    /// agent's metadata is the address.
    pub(crate) address: Option<String>,
    /// The reason for the choice, for logs and the status page.
    pub(crate) why: String,
}

/// The error that no wire serves both sides.
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
    /// The adverts in the receiver's hello; `None` for an LMCache peer, which sends no hello and has NIXL.
    pub(crate) theirs: Option<&'a [Advert]>,
    /// The name by which the receiver's init port was reached.
    pub(crate) host: &'a str,
    /// Checks that this process's wire reaches the receiver of an advert; the error says why it does not.
    pub(crate) reaches: &'a dyn Fn(Kind, &Advert) -> Result<(), String>,
    /// Returns the reason why this process's wire is only a last choice; `None` if it is not.
    pub(crate) poor: &'a dyn Fn(Kind) -> Option<String>,
}

/// Chooses the wire for a link.
///
/// CUDA IPC is first if it reaches the receiver: over NVLink it is a little faster than NIXL, which copies in
/// the same way below (docs/benchmarks.md), and it reports memory that it cannot reach instead of staging it
/// through sockets. NIXL is second: it reaches NVLink, RDMA and shared memory, and if it has only TCP, it is
/// about as fast as the built-in wire.
///
/// # Errors
/// The text names what is missing on which side.
pub(crate) fn choose(wanted: Wanted, sides: Sides<'_>) -> Result<Chosen, NoWire> {
    if let Wanted::Only(kind) = wanted {
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
    // Wires that are a last choice come after all others. The order among the rest stays, because the sort is
    // stable.
    let mut lacks = Vec::new();
    let mut order: Vec<(Kind, Option<String>)> =
        BEST_FIRST.map(|kind| (kind, (sides.poor)(kind))).into();
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
            // A host without GPU buffers does not miss CUDA IPC, so its absence is not a reason to report.
            Err(Lack::Here(Kind::CudaIpc)) => {}
            Err(lack) => lacks.push(lack.to_string()),
        }
    }
    let text = format!("no wire serves both sides: {}", lacks.join("; "));
    Err(NoWire { text })
}

const BEST_FIRST: [Kind; 3] = [Kind::CudaIpc, Kind::Nixl, Kind::Tcp];

/// Returns `host:port`, with brackets around an IPv6 address.
pub(super) fn join(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
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
        return match kind {
            Kind::Nixl => Ok(None),
            Kind::Tcp | Kind::CudaIpc => Err(Lack::LmCache(kind)),
        };
    };
    let mut offers = theirs.iter().filter(|advert| advert.kind == kind.as_str());
    let Some(offer) = offers.next() else {
        return Err(Lack::There(kind));
    };
    (sides.reaches)(kind, offer).map_err(|why| Lack::OutOfReach(kind, why))?;
    match kind {
        Kind::CudaIpc => Ok(Some(offer.address.clone())),
        Kind::Nixl => Ok(None),
        // A sender without a receiving half has an empty address in its advert.
        Kind::Tcp if offer.address.is_empty() => Err(Lack::There(kind)),
        Kind::Tcp => complete(&offer.address, sides.host)
            .map(Some)
            .ok_or_else(|| Lack::BadAddress(kind, offer.address.clone())),
    }
}

/// Completes `:port` with the host by which the peer is already known; `None` if the port is not valid.
fn complete(address: &str, host: &str) -> Option<String> {
    let (name, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    Some(if name.is_empty() {
        join(host, port)
    } else {
        address.to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: &[Kind] = &[Kind::Nixl, Kind::Tcp];
    const NIXL: Wanted = Wanted::Only(Kind::Nixl);
    const TCP: Wanted = Wanted::Only(Kind::Tcp);

    /// Checks a choice. `theirs` has the words `nixl` and `tcp@ADDRESS`, or `lmcache` alone.
    fn check(
        wanted: Wanted,
        ours: &[Kind],
        theirs: &str,
        expect: Result<(Kind, &str, &str), &str>,
    ) {
        check_to("known", wanted, ours, theirs, expect);
    }

    fn check_to(
        host: &str,
        wanted: Wanted,
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
            reaches: &|kind, advert| match (kind, &advert.address[..]) {
                (Kind::CudaIpc, "far") => Err("too far".to_owned()),
                _ => Ok(()),
            },
            poor: &|kind| {
                (kind == Kind::Nixl && host == "no rdma").then(|| "nixl is slow here".to_owned())
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
        let nixl = Ok((Kind::Nixl, "", "auto: both sides have nixl"));
        check(Wanted::Auto, BOTH, "nixl tcp@h:1", nixl);
        check(Wanted::Auto, BOTH, "tcp@h:1 nixl", nixl);
        check(Wanted::Auto, BOTH, "lmcache", nixl);
        check(Wanted::Auto, &[Kind::Nixl], "rdma2 nixl", nixl);
        check(
            Wanted::Auto,
            &[Kind::Tcp],
            "nixl tcp@h:1",
            Ok((Kind::Tcp, "h:1", "auto: this side has no nixl")),
        );
        check(
            Wanted::Auto,
            BOTH,
            "tcp@h:1",
            Ok((Kind::Tcp, "h:1", "auto: the receiver offers no nixl")),
        );
        check(
            Wanted::Auto,
            &[Kind::Tcp],
            "nixl",
            Err("no wire serves both sides: this side has no nixl; the receiver offers no tcp"),
        );
        check(
            Wanted::Auto,
            &[Kind::Tcp],
            "lmcache",
            Err(
                "no wire serves both sides: this side has no nixl; the receiver is LMCache, which \
                 has no tcp",
            ),
        );
        check(
            Wanted::Auto,
            &[],
            "nixl tcp@h:1",
            Err("no wire serves both sides: this side has no nixl; this side has no tcp"),
        );
    }

    #[test]
    fn cuda_ipc_goes_first_where_it_reaches() {
        let all = &[Kind::CudaIpc, Kind::Nixl, Kind::Tcp];
        let check = |theirs, expect| check(Wanted::Auto, all, theirs, expect);
        let near = "auto: both sides have cuda_ipc";
        check("tcp@h:1 nixl cuda_ipc@x", Ok((Kind::CudaIpc, "x", near)));
        check(
            "cuda_ipc@far nixl",
            Ok((Kind::Nixl, "", "auto: no cuda_ipc: too far")),
        );
        let both = "auto: the receiver offers no cuda_ipc; the receiver offers no nixl";
        check("tcp@h:1", Ok((Kind::Tcp, "h:1", both)));
        let far = "transport cuda_ipc is configured, but no cuda_ipc: too far";
        let only = Wanted::Only(Kind::CudaIpc);
        super::tests::check(only, all, "cuda_ipc@far nixl", Err(far));
        let none = "transport cuda_ipc is configured, but this side has no cuda_ipc";
        super::tests::check(only, BOTH, "cuda_ipc@x", Err(none));
    }

    #[test]
    fn a_poor_wire_is_the_last_choice() {
        let check = |wanted, ours: &[Kind], theirs, expect| {
            check_to("no rdma", wanted, ours, theirs, expect);
        };
        let tcp = Ok((Kind::Tcp, "h:1", "auto: nixl is slow here"));
        check(Wanted::Auto, BOTH, "nixl tcp@h:1", tcp);
        let none = "auto: the receiver offers no tcp";
        check(Wanted::Auto, BOTH, "nixl", Ok((Kind::Nixl, "", none)));
        check(
            NIXL,
            BOTH,
            "nixl tcp@h:1",
            Ok((Kind::Nixl, "", "configured")),
        );
    }

    #[test]
    fn a_configured_wire_is_used_or_refused_never_replaced() {
        check(
            NIXL,
            BOTH,
            "nixl tcp@h:1",
            Ok((Kind::Nixl, "", "configured")),
        );
        check(NIXL, BOTH, "lmcache", Ok((Kind::Nixl, "", "configured")));
        check(
            TCP,
            BOTH,
            "nixl tcp@h:1",
            Ok((Kind::Tcp, "h:1", "configured")),
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
                &[Kind::Tcp][..],
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
                &[Kind::Nixl][..],
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
            check(TCP, BOTH, offer, Ok((Kind::Tcp, expect, "configured")));
        }
        for address in ["h", "h:", "h:0", "h:65536", ":"] {
            let text = format!(
                "transport tcp is configured, but the receiver offers tcp at {address:?}, which is \
                 no host:port"
            );
            check(TCP, BOTH, &format!("tcp@{address}"), Err(&text));
        }
        assert_eq!(join("fe80::1", 5), "[fe80::1]:5");
    }
}
