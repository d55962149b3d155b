//! The instances among which a request's model leaves a choice.

use std::sync::Arc;

use crate::fleet::instance::Instance;

/// The instances among which a request's model leaves a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope<'a> {
    /// Instances that are known to serve this model or adapter.
    Known(&'a str),
    /// Instances with unknown names: no decode instance is known to serve this model or adapter, but one of these may
    /// serve it.
    Unlisted(&'a str),
    /// All instances: no instance has given the names of its models.
    All,
}

impl<'a> Scope<'a> {
    /// Returns the scope of a request that names this model; `None` if it names none.
    ///
    /// A request without a model, or with a name that no instance serves, goes to the instances of the first decode
    /// instance's model: one vLLM gives its own model to the former, and answers the latter with its own error.
    pub(crate) fn of(instances: &'a [Arc<Instance>], model: Option<&'a str>) -> Self {
        let mut first = None;
        let mut is_any_unlisted = false;
        for instance in instances.iter().filter(|i| i.decodes()) {
            if let Some(name) = model.filter(|name| instance.models.serves(name)) {
                return Self::Known(name);
            }
            first = first.or_else(|| instance.models.base());
            is_any_unlisted |= !instance.models.is_known();
        }
        match (first, model) {
            (Some(_), Some(name)) if is_any_unlisted => Self::Unlisted(name),
            (Some(first), _) => Self::Known(first),
            (None, _) => Self::All,
        }
    }

    /// Returns true if the instance may decode the request.
    pub(crate) fn decodes(self, instance: &Instance) -> bool {
        match self {
            Self::Known(name) => instance.models.serves(name),
            Self::Unlisted(_) => !instance.models.is_known(),
            Self::All => true,
        }
    }

    /// Returns true if the instance may compute the request's prompt. An instance with unknown names may: a wrong guess
    /// costs one prefill leg.
    pub(crate) fn prefills(self, instance: &Instance) -> bool {
        match self {
            Self::Known(name) | Self::Unlisted(name) => {
                !instance.models.is_known() || instance.models.serves(name)
            }
            Self::All => true,
        }
    }
}
