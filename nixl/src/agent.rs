//! The agent: the local side of all NIXL connections of this process.

use std::cell::RefCell;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::Arc;

use nixl_sys::{
    Api, Library, nixl_capi_agent, nixl_capi_backend, nixl_capi_config, nixl_capi_options,
    nixl_capi_sync,
};

use crate::error::{Error, check};
use crate::handle::{Undo, c_string, made};
use crate::inner::AgentInner;
use crate::memory::{Memory, Pinned, Registration};
use crate::remote::Remote;
use crate::transfer::Merge;

/// The parameters of an [`Agent`].
#[derive(Clone, Debug)]
pub struct Config {
    /// The name under which peers load the agent. Each start must use a new name, because peers cache the agent's
    /// metadata under its name.
    pub name: String,
    /// The name of the backend's plugin, for example `UCX`.
    pub backend: String,
    /// Backend parameters that replace the plugin's defaults; none if empty.
    pub params: Vec<(String, String)>,
}

impl Config {
    /// Returns the parameters of an agent with the UCX backend and its defaults.
    pub fn ucx(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            backend: "UCX".to_owned(),
            params: Vec::new(),
        }
    }
}

/// An agent with one backend. Only the thread that made the agent can use it.
#[derive(Clone, Debug)]
pub struct Agent(pub(crate) Rc<AgentInner>);

impl Agent {
    /// Creates an agent and its backend, without the library's progress thread.
    ///
    /// # Errors
    /// Fails if the plugin is missing, or if the backend refuses its parameters or the `UCX_*`
    /// environment.
    pub fn new(library: &'static Library, config: &Config) -> Result<Self, Error> {
        create_inner(library.api(), config).map(|inner| Self(Rc::new(inner)))
    }

    /// Returns the name from [`Config::name`].
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Registers memory, so that this agent can write from it and the agent's peers can write into
    /// it.
    ///
    /// # Errors
    /// Fails if the backend cannot register the memory (limits on locked memory, on RDMA).
    pub fn register(
        &self,
        memory: Arc<dyn Pinned>,
        kind: Memory,
        device: u64,
    ) -> Result<Registration, Error> {
        Registration::new(Rc::clone(&self.0), memory, kind, device)
    }

    /// Returns the metadata that a peer must load before it can write into the memory that is
    /// registered at this moment.
    ///
    /// # Errors
    /// Fails if the library cannot serialize the metadata.
    pub fn metadata(&self) -> Result<Vec<u8>, Error> {
        let mut blob = ptr::null_mut();
        let mut length = 0;
        // SAFETY: live agent; both out-pointers are valid.
        let status = unsafe {
            self.0
                .api
                .nixl_capi_get_local_md(self.0.raw(), &mut blob, &mut length)
        };
        check("get_local_md", status)?;
        // SAFETY: on success `blob` holds `length` malloc'ed bytes that belong to the caller.
        let bytes = unsafe { std::slice::from_raw_parts(blob.cast::<u8>(), length) }.to_vec();
        // SAFETY: the library allocated the blob with malloc; it is freed once.
        unsafe { libc::free(blob) };
        Ok(bytes)
    }

    /// Loads a peer's metadata and connects to it.
    ///
    /// If the peer is loaded already, both loads share one connection. If that connection has
    /// failed, a new connection replaces it.
    ///
    /// # Errors
    /// Fails if NIXL cannot use the blob, or if the two agents have no transport in common. Fails
    /// with [`Error::Taken`] if another peer has the name, and with [`Error::Busy`] if transfers of
    /// the failed connection have not ended.
    pub fn load(&self, metadata: &[u8]) -> Result<Remote, Error> {
        Remote::load(&self.0, metadata)
    }

    /// Lets the backend work: it accepts connections, receives data, and sends queued data.
    ///
    /// Discards the notifications that LMCache peers may send. Sidecars send no notifications: they exchange
    /// their messages over ZeroMQ.
    ///
    /// # Errors
    /// Fails if the library reports an error of the backend.
    pub fn progress(&self) -> Result<(), Error> {
        let inner = &*self.0;
        // SAFETY: live agent and map; only this function uses the map, on one thread.
        let status = unsafe {
            inner.api.nixl_capi_get_notifs(
                inner.raw(),
                inner.notifications.as_ptr(),
                inner.options.as_ptr(),
            )
        };
        check("get_notifs", status)?;
        // SAFETY: live map.
        let status = unsafe {
            inner
                .api
                .nixl_capi_notif_map_clear(inner.notifications.as_ptr())
        };
        check("notif_map_clear", status)
    }
}

/// Creates the agent, its backend, and the options that name the backend.
///
/// Each step wraps its handle in [`Undo`], so that a failure of a later step destroys the handle.
fn create_inner(api: &'static Api, config: &Config) -> Result<AgentInner, Error> {
    let name = c_string("create_configured_agent", &config.name)?;
    let raw = nixl_capi_config {
        progress_thread: false,
        listen_thread: false,
        listen_port: 0,
        // The types are not Send, so only one thread uses the agent.
        sync: nixl_capi_sync::NIXL_CAPI_SYNC_NONE,
        workers: 1,
        // Not used, because both threads are off.
        progress_delay_us: 0,
        listen_delay_us: 0,
        telemetry: false,
    };
    // SAFETY: `name` and `raw` live through the call, the out-pointer is valid.
    let agent = made("create_configured_agent", |out| unsafe {
        api.nixl_capi_create_configured_agent(name.as_ptr(), &raw, out)
    })?;
    let agent = Undo::new(agent, |agent| {
        // SAFETY: made above; no other handle refers to the agent any more.
        unsafe { api.nixl_capi_destroy_agent(agent) };
    });
    let backend = Undo::new(create_backend(api, agent.get(), config)?, |backend| {
        // SAFETY: made above. The call frees the handle; the agent owns the backend itself.
        unsafe { api.nixl_capi_destroy_backend(backend) };
    });
    let options = Undo::new(options_for(api, backend.get(), Merge::Neighbours)?, |o| {
        // SAFETY: made above.
        unsafe { api.nixl_capi_destroy_opt_args(o) };
    });
    let split = Undo::new(options_for(api, backend.get(), Merge::Nothing)?, |o| {
        // SAFETY: made above.
        unsafe { api.nixl_capi_destroy_opt_args(o) };
    });
    // SAFETY: the out-pointer is valid.
    let notifications = made("create_notif_map", |out| unsafe {
        api.nixl_capi_create_notif_map(out)
    })?;
    Ok(AgentInner {
        api,
        name: config.name.clone(),
        notifications,
        split: split.keep(),
        options: options.keep(),
        backend: backend.keep(),
        agent: agent.keep(),
        remotes: RefCell::default(),
    })
}

/// Loads the plugin and creates a backend from the plugin's default parameters and the parameters
/// in `config`.
fn create_backend(
    api: &'static Api,
    agent: *mut nixl_capi_agent,
    config: &Config,
) -> Result<NonNull<nixl_capi_backend>, Error> {
    let plugin = c_string("create_backend", &config.backend)?;
    let mut memories = ptr::null_mut();
    // SAFETY: live agent, NUL-terminated name, valid out-pointers.
    let params = made("get_plugin_params", |out| unsafe {
        api.nixl_capi_get_plugin_params(agent, plugin.as_ptr(), &mut memories, out)
    })
    .map_err(|_| Error::NoPlugin {
        plugin: config.backend.clone(),
    })?;
    // SAFETY: on success the list belongs to the caller.
    unsafe { api.nixl_capi_destroy_mem_list(memories) };
    let params = Undo::new(params, |params| {
        // SAFETY: on success the parameters belong to the caller; the backend keeps a copy.
        unsafe { api.nixl_capi_destroy_params(params) };
    });
    for (key, value) in &config.params {
        let key = c_string("params_add", key)?;
        let value = c_string("params_add", value)?;
        // SAFETY: live list; the library copies both strings.
        let status =
            unsafe { api.nixl_capi_params_add(params.get(), key.as_ptr(), value.as_ptr()) };
        check("params_add", status)?;
    }
    // SAFETY: live agent and parameters, NUL-terminated name, valid out-pointer.
    made("create_backend", |out| unsafe {
        api.nixl_capi_create_backend(agent, plugin.as_ptr(), params.get(), out)
    })
}

/// Returns options that name the backend, and that switch the merge of neighbouring descriptors on
/// or off.
fn options_for(
    api: &'static Api,
    backend: *mut nixl_capi_backend,
    merge: Merge,
) -> Result<NonNull<nixl_capi_options>, Error> {
    // SAFETY: the out-pointer is valid.
    let options = made("create_opt_args", |out| unsafe {
        api.nixl_capi_create_opt_args(out)
    })?;
    let options = Undo::new(options, |options| {
        // SAFETY: made above.
        unsafe { api.nixl_capi_destroy_opt_args(options) };
    });
    // SAFETY: live options. The backend outlives them, because `AgentInner` destroys it later.
    let status = unsafe { api.nixl_capi_opt_args_add_backend(options.get(), backend) };
    check("opt_args_add_backend", status)?;
    if merge == Merge::Nothing {
        // SAFETY: live options.
        let status = unsafe { api.nixl_capi_opt_args_set_skip_desc_merge(options.get(), true) };
        check("opt_args_set_skip_desc_merge", status)?;
    }
    Ok(options.keep())
}
