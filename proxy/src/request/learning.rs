//! Learns from a request for later requests: refusals that will repeat, and pairs that work.

use std::time::Instant;

use super::Drive;
use crate::request::context::RequestContext;
use crate::routing::refusals::Refused;

impl Drive {
    /// Notes the reason why the prefill leg's KV is not handed over. The leg was useless.
    pub(super) fn refused(&self, context: &RequestContext, reason: &str) {
        let Ok(prefill) = &self.pair.prefill else {
            return;
        };
        let refused = Refused {
            request: &context.id.0,
            prefill,
            decode: &self.pair.decode,
            body: &self.body,
            endpoint: self.endpoint,
        };
        self.app.refusals.note(Instant::now(), reason, refused);
    }

    /// Learns from the senders' notices whether the pair works. The caller calls this function when a decode
    /// leg that waited for KV is answered, because the notices come before this answer.
    pub(super) fn learn(&self, context: &RequestContext) {
        let (Ok(prefill), true) = (&self.pair.prefill, context.waits_for_kv()) else {
            return;
        };
        let Some(moved) = context.progress().and_then(|progress| progress.moved()) else {
            return;
        };
        match moved.reason.filter(|_| !moved.ok) {
            Some(reason) => self.refused(context, reason.as_str()),
            None if moved.ok && moved.bytes > 0 => {
                let (body, endpoint) = (&self.body, self.endpoint);
                let refusals = &self.app.refusals;
                refusals.worked(prefill, &self.pair.decode, body, endpoint);
            }
            None => {}
        }
    }
}
