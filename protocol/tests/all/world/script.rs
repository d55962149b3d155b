//! Turns a plan into the first steps of both engines.

use protocol::RequestId;

use super::engines::{Step, Turn};
use super::kept::prefill_id;
use super::plan::{Park, Plan, RequestPlan};
use super::{Happening, MS, World};

impl World {
    pub(crate) fn script(&mut self, plan: &Plan) {
        for request in &plan.requests {
            self.script_request(request, self.now);
            if let Some(ms) = plan.again_ms {
                let again = Happening::Again(request.clone());
                self.after(u64::from(ms) * MS, again);
            }
        }
        for &(at, fault) in &plan.faults {
            self.after(u64::from(at) * MS, Happening::Fault(fault));
        }
    }

    pub(crate) fn script_request(&mut self, plan: &RequestPlan, from: u64) {
        if !plan.kept {
            self.decode.plans.insert(plan.name.clone(), plan.clone());
        }
        if let (false, Park::AtMs(ms)) = (plan.kept, plan.park) {
            let turn = Turn::Park(plan.name.clone());
            self.at(from + u64::from(ms) * MS, Happening::Decode(turn));
        }
        if let Some(ms) = plan.reserve_at_ms {
            let step = Step::Reserve(plan.clone());
            self.at(from + u64::from(ms) * MS, Happening::Prefill(step));
        }
    }

    /// Starts a request with the same id again, unless an engine still has the old request.
    pub(crate) fn again(&mut self, plan: &RequestPlan) {
        if self.decode.is_free(&plan.name) && !self.prefill.live.contains_key(&prefill_id(plan)) {
            self.script_request(plan, self.now);
        }
    }

    /// Handles a message to the proxy. The proxy then sends the decode request.
    pub(crate) fn proxy_hears(&mut self, req: &RequestId, begun: bool) {
        let delay = match self.decode.plans.get(&req.0).map(|p| p.park) {
            Some(Park::OnProgress(ms)) if begun => ms,
            Some(Park::OnNotify(ms)) if !begun => ms,
            _ => return,
        };
        let turn = Turn::Park(req.0.clone());
        self.after(u64::from(delay) * MS, Happening::Decode(turn));
    }
}
