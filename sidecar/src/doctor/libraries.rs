//! The libraries that transports load at run time.

use super::finding::{Results, kinds};
use super::subject::Subject;
use crate::transport::table::Choice;

kinds! {
    REQUIRED = Error "library-required":
        "the configuration names a transport whose library cannot be loaded, so the sidecar does not start";
        "install the library where the sidecar looks for it (pip install nixl in the engine's environment, and \
         VIRTUAL_ENV), or set sidecar.transport to auto";
    MISSING = Warning "library-missing":
        "the sidecar uses its built-in TCP transport instead: no RDMA, and no NVLink between hosts";
        "pip install nixl in the engine's environment and start the sidecar with this VIRTUAL_ENV, or set \
         sidecar.transport to tcp";
}

/// Loads the library of each transport that the configuration allows.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let wanted = subject
        .config
        .map_or(Choice::Auto, |config| config.transport);
    for kind in wanted.kinds() {
        if kind.needs_gpu() && !subject.wants_gpu() {
            continue;
        }
        match kind.library() {
            None => {}
            Some(Ok(found)) => results.fact("libraries", format!("{kind}: {found}")),
            Some(Err(error)) if wanted == Choice::Only(kind) => {
                results.add(&REQUIRED, format!("{kind}: {error}"));
            }
            // A missing GPU is a finding of its own.
            Some(Err(_)) if kind.needs_gpu() => {}
            Some(Err(error)) => results.add(&MISSING, format!("{kind}: {error}")),
        }
    }
}
