//! The agent: one process's end of all its connections.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::ptr::{self, NonNull};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use nixl_sys::{
    Api, Library, nixl_capi_agent, nixl_capi_backend, nixl_capi_config, nixl_capi_notifications,
    nixl_capi_options, nixl_capi_sync,
};

use crate::error::check;
use crate::memory::{Memory, Pinned, Registration};
use crate::remote::{Remote, RemoteInner};
use crate::{Error, Merge};

/// How to make an [`Agent`].
#[derive(Clone, Debug)]
pub struct Config {
    /// The name under which peers load it; new at each start, since peers cache by it.
    pub name: String,
    /// The backend's plugin.
    pub backend: String,
    /// Backend parameters that replace the plugin's defaults.
    pub params: Vec<(String, String)>,
}

impl Config {
    /// The UCX backend with its default parameters.
    pub fn ucx(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            backend: "UCX".to_owned(),
            params: Vec::new(),
        }
    }
}

/// An agent with one backend, used by the thread that made it.
#[derive(Clone, Debug)]
pub struct Agent(pub(crate) Rc<AgentInner>);

impl Agent {
    /// Makes an agent and its backend, without the library's progress thread.
    ///
    /// # Errors
    /// No plugin, or the backend refuses its parameters or the `UCX_*` environment.
    pub fn new(library: &'static Library, config: &Config) -> Result<Self, Error> {
        AgentInner::new(library.api(), config).map(|inner| Self(Rc::new(inner)))
    }

    /// The name that [`Config::name`] gave.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Makes `memory` a source of this agent's writes and a target of its peers' writes.
    ///
    /// # Errors
    /// The backend cannot register it (limits on locked memory, on RDMA).
    pub fn register(
        &self,
        memory: Arc<dyn Pinned>,
        kind: Memory,
        device: u64,
    ) -> Result<Registration, Error> {
        Registration::new(Rc::clone(&self.0), memory, kind, device)
    }

    /// What a peer must load to write into what is registered now.
    ///
    /// # Errors
    /// The library's.
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
        // SAFETY: on success `blob` holds `length` malloc'ed bytes that are ours.
        let bytes = unsafe { std::slice::from_raw_parts(blob.cast::<u8>(), length) }.to_vec();
        // SAFETY: malloc'ed by the library, freed once.
        unsafe { libc::free(blob) };
        Ok(bytes)
    }

    /// Loads a peer's metadata and connects to it.
    ///
    /// A peer that is loaded already is shared; one whose connection failed is replaced.
    ///
    /// # Errors
    /// A blob that NIXL cannot use, a peer without a common wire, or [`Error::Busy`].
    pub fn load(&self, metadata: &[u8]) -> Result<Remote, Error> {
        Remote::load(&self.0, metadata)
    }

    /// Lets the backend work: accept connections, receive, send what is queued.
    ///
    /// Notifications that LMCache peers may send are thrown away: our peers' words travel elsewhere.
    ///
    /// # Errors
    /// The library's.
    pub fn progress(&self) -> Result<(), Error> {
        let inner = &*self.0;
        // SAFETY: live agent and map; the map is only used here, on this thread.
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

/// The handles. Field order does not matter: [`Drop`] destroys them in the order they need.
pub(crate) struct AgentInner {
    pub(crate) api: &'static Api,
    name: String,
    agent: NonNull<nixl_capi_agent>,
    backend: NonNull<nixl_capi_backend>,
    /// Names the backend.
    pub(crate) options: NonNull<nixl_capi_options>,
    /// The same, and keeps neighbouring descriptors apart.
    split: NonNull<nixl_capi_options>,
    notifications: NonNull<nixl_capi_notifications>,
    /// The remote that NIXL holds under each name. Weak: the users of a remote own it.
    pub(crate) remotes: RefCell<HashMap<CString, Weak<RemoteInner>>>,
}

impl AgentInner {
    fn new(api: &'static Api, config: &Config) -> Result<Self, Error> {
        let name = c_string("create_configured_agent", &config.name)?;
        let raw = nixl_capi_config {
            progress_thread: false,
            listen_thread: false,
            listen_port: 0,
            // The types are not Send, so there is one thread.
            sync: nixl_capi_sync::NIXL_CAPI_SYNC_NONE,
            workers: 1,
            // Unused without the threads.
            progress_delay_us: 0,
            listen_delay_us: 0,
            telemetry: false,
        };
        // SAFETY: `name` and `raw` live through the call, the out-pointer is valid.
        let agent = made("create_configured_agent", |out| unsafe {
            api.nixl_capi_create_configured_agent(name.as_ptr(), &raw, out)
        })?;
        let agent = Undo::new(agent, |agent| {
            // SAFETY: made above, nothing else refers to it.
            unsafe { api.nixl_capi_destroy_agent(agent) };
        });
        let backend = Undo::new(create_backend(api, agent.get(), config)?, |backend| {
            // SAFETY: made above; frees the handle, the agent owns the backend.
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
        Ok(Self {
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

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn raw(&self) -> *mut nixl_capi_agent {
        self.agent.as_ptr()
    }

    pub(crate) fn options(&self, merge: Merge) -> *mut nixl_capi_options {
        match merge {
            Merge::Neighbours => self.options.as_ptr(),
            Merge::Nothing => self.split.as_ptr(),
        }
    }
}

impl fmt::Debug for AgentInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Drop for AgentInner {
    fn drop(&mut self) {
        // SAFETY: each was made by `new` and is destroyed once. Registrations, remotes, lists and
        // requests hold a counted reference to the agent, so none is left. The agent goes last
        // because the options and the backend's handle point into it.
        let status = unsafe {
            self.api
                .nixl_capi_destroy_notif_map(self.notifications.as_ptr());
            self.api.nixl_capi_destroy_opt_args(self.split.as_ptr());
            self.api.nixl_capi_destroy_opt_args(self.options.as_ptr());
            self.api.nixl_capi_destroy_backend(self.backend.as_ptr());
            self.api.nixl_capi_destroy_agent(self.agent.as_ptr())
        };
        if let Err(error) = check("destroy_agent", status) {
            tracing::warn!(agent = self.name, %error, "nixl agent not destroyed cleanly");
        }
    }
}

/// The handle that a constructor of the C API wrote on success.
pub(crate) fn made<T>(
    call: &'static str,
    create: impl FnOnce(*mut *mut T) -> nixl_sys::nixl_capi_status,
) -> Result<NonNull<T>, Error> {
    let mut handle = ptr::null_mut();
    check(call, create(&mut handle))?;
    NonNull::new(handle).ok_or(Error::Status { call, status: 0 })
}

pub(crate) fn c_string(call: &'static str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Invalid { call })
}

/// Takes over a malloc'ed C string.
pub(crate) fn take_string(text: NonNull<std::ffi::c_char>) -> CString {
    // SAFETY: the C API gives a NUL-terminated string that is the caller's.
    let copy = unsafe { CStr::from_ptr(text.as_ptr()) }.to_owned();
    // SAFETY: malloc'ed by the library, freed once.
    unsafe { libc::free(text.as_ptr().cast::<c_void>()) };
    copy
}

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
    // SAFETY: the list is ours on success.
    unsafe { api.nixl_capi_destroy_mem_list(memories) };
    let params = Undo::new(params, |params| {
        // SAFETY: ours on success; the backend keeps a copy.
        unsafe { api.nixl_capi_destroy_params(params) };
    });
    for (key, value) in &config.params {
        let key = c_string("params_add", key)?;
        let value = c_string("params_add", value)?;
        // SAFETY: live list, both strings are copied.
        let status =
            unsafe { api.nixl_capi_params_add(params.get(), key.as_ptr(), value.as_ptr()) };
        check("params_add", status)?;
    }
    // SAFETY: as above.
    made("create_backend", |out| unsafe {
        api.nixl_capi_create_backend(agent, plugin.as_ptr(), params.get(), out)
    })
}

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
    // SAFETY: live options; the backend outlives them, see `Drop`.
    let status = unsafe { api.nixl_capi_opt_args_add_backend(options.get(), backend) };
    check("opt_args_add_backend", status)?;
    if merge == Merge::Nothing {
        // SAFETY: live options.
        let status = unsafe { api.nixl_capi_opt_args_set_skip_desc_merge(options.get(), true) };
        check("opt_args_set_skip_desc_merge", status)?;
    }
    Ok(options.keep())
}

/// Destroys a handle unless construction gets far enough to keep it.
struct Undo<T, F: FnMut(*mut T)>(NonNull<T>, Option<F>);

impl<T, F: FnMut(*mut T)> Undo<T, F> {
    fn new(handle: NonNull<T>, destroy: F) -> Self {
        Self(handle, Some(destroy))
    }

    fn get(&self) -> *mut T {
        self.0.as_ptr()
    }

    fn keep(mut self) -> NonNull<T> {
        self.1 = None;
        self.0
    }
}

impl<T, F: FnMut(*mut T)> Drop for Undo<T, F> {
    fn drop(&mut self) {
        if let Some(mut destroy) = self.1.take() {
            destroy(self.0.as_ptr());
        }
    }
}
