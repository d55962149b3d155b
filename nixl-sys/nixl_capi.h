/*
 * The part of NIXL's C API (libnixl_capi.so, from NIXL's Python wheels) that this project calls.
 *
 * Functions that this project does not call are not declared, so a library that lacks them still loads.
 * Every declaration was checked against the exported symbols and the machine code of NIXL 1.5.1. The
 * agent configuration has had this layout since the function that takes it was added.
 *
 * Every function except nixl_capi_is_stub returns a status: 0 done, 1 in progress, negative an error.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum nixl_capi_status {
    /* Done. */
    NIXL_CAPI_DONE = 0,
    /* Posted and not finished yet. */
    NIXL_CAPI_RUNNING = 1,
    /* A pointer is null, an index is out of range, or lists do not fit together. */
    NIXL_CAPI_INVALID_PARAMETER = -1,
    /* Nearly every other failure: the peer has ended, a plugin is missing, a blob is wrong. */
    NIXL_CAPI_BACKEND = -2,
    NIXL_CAPI_INVALID_STATE = -3,
    NIXL_CAPI_EXCEPTION = -4,
    NIXL_CAPI_NO_TELEMETRY = -5,
    /* The metadata is not loaded (NIXL may have dropped it), or the memory is not registered. */
    NIXL_CAPI_NOT_FOUND = -6,
};

enum nixl_capi_memory {
    NIXL_CAPI_DRAM = 0,
    NIXL_CAPI_VRAM = 1,
};

enum nixl_capi_sync {
    /* One thread uses the agent. */
    NIXL_CAPI_SYNC_NONE = 0,
    NIXL_CAPI_SYNC_STRICT = 1,
    NIXL_CAPI_SYNC_RW = 2,
};

enum nixl_capi_operation {
    NIXL_CAPI_READ = 0,
    NIXL_CAPI_WRITE = 1,
};

enum nixl_capi_estimate {
    NIXL_CAPI_ANALYTICAL = 0,
};

/* The library reads the fields by offset, so their order and types must not change. */
struct nixl_capi_config {
    /* Starts the library's own polling thread. */
    bool progress_thread;
    /* Starts the library's own metadata server. */
    bool listen_thread;
    int listen_port;
    enum nixl_capi_sync sync;
    unsigned int workers;
    uint64_t progress_delay_us;
    uint64_t listen_delay_us;
    bool telemetry;
};

typedef struct nixl_capi_agent nixl_capi_agent;
typedef struct nixl_capi_backend nixl_capi_backend;
typedef struct nixl_capi_params nixl_capi_params;
typedef struct nixl_capi_memories nixl_capi_memories;
typedef struct nixl_capi_options nixl_capi_options;
/* Descriptors to register. */
typedef struct nixl_capi_regions nixl_capi_regions;
/* Descriptors to transfer. */
typedef struct nixl_capi_descriptors nixl_capi_descriptors;
/* Descriptors that the library has looked up. Requests name them by index. */
typedef struct nixl_capi_prepared nixl_capi_prepared;
typedef struct nixl_capi_request nixl_capi_request;
typedef struct nixl_capi_notifications nixl_capi_notifications;

/* Returns true if the library is the stub that NIXL's build links to. In the stub every other call
 * aborts the process. */
bool nixl_capi_is_stub(void);

enum nixl_capi_status nixl_capi_create_configured_agent(
    const char *name, const struct nixl_capi_config *config, nixl_capi_agent **agent);
enum nixl_capi_status nixl_capi_destroy_agent(nixl_capi_agent *agent);

/* Returns the plugin's default parameters. Both lists belong to the caller. */
enum nixl_capi_status nixl_capi_get_plugin_params(
    nixl_capi_agent *agent, const char *plugin, nixl_capi_memories **memories,
    nixl_capi_params **params);
enum nixl_capi_status nixl_capi_destroy_mem_list(nixl_capi_memories *memories);
/* Replaces a parameter or adds one. Copies both strings. */
enum nixl_capi_status nixl_capi_params_add(
    nixl_capi_params *params, const char *key, const char *value);
enum nixl_capi_status nixl_capi_destroy_params(nixl_capi_params *params);

/* The handle belongs to the caller, the backend itself to the agent. */
enum nixl_capi_status nixl_capi_create_backend(
    nixl_capi_agent *agent, const char *plugin, nixl_capi_params *params,
    nixl_capi_backend **backend);
enum nixl_capi_status nixl_capi_destroy_backend(nixl_capi_backend *backend);

enum nixl_capi_status nixl_capi_create_opt_args(nixl_capi_options **options);
enum nixl_capi_status nixl_capi_destroy_opt_args(nixl_capi_options *options);
enum nixl_capi_status nixl_capi_opt_args_add_backend(
    nixl_capi_options *options, nixl_capi_backend *backend);
enum nixl_capi_status nixl_capi_opt_args_set_skip_desc_merge(
    nixl_capi_options *options, bool skip);

enum nixl_capi_status nixl_capi_create_reg_dlist(
    enum nixl_capi_memory memory, nixl_capi_regions **regions);
enum nixl_capi_status nixl_capi_destroy_reg_dlist(nixl_capi_regions *regions);
enum nixl_capi_status nixl_capi_reg_dlist_add_desc(
    nixl_capi_regions *regions, uintptr_t address, size_t length, uint64_t device,
    const void *metadata, size_t metadata_length);
enum nixl_capi_status nixl_capi_register_mem(
    nixl_capi_agent *agent, nixl_capi_regions *regions, nixl_capi_options *options);
enum nixl_capi_status nixl_capi_deregister_mem(
    nixl_capi_agent *agent, nixl_capi_regions *regions, nixl_capi_options *options);

enum nixl_capi_status nixl_capi_create_xfer_dlist(
    enum nixl_capi_memory memory, nixl_capi_descriptors **descriptors);
enum nixl_capi_status nixl_capi_destroy_xfer_dlist(nixl_capi_descriptors *descriptors);
enum nixl_capi_status nixl_capi_xfer_dlist_add_desc(
    nixl_capi_descriptors *descriptors, uintptr_t address, size_t length, uint64_t device);

/* The caller must free the blob. */
enum nixl_capi_status nixl_capi_get_local_md(
    nixl_capi_agent *agent, void **blob, size_t *length);
/* The caller must free the name. */
enum nixl_capi_status nixl_capi_load_remote_md(
    nixl_capi_agent *agent, const void *blob, size_t length, char **name);
/* With an empty list, checks only that the metadata is loaded. */
enum nixl_capi_status nixl_capi_check_remote_md(
    nixl_capi_agent *agent, const char *name, nixl_capi_descriptors *descriptors);
enum nixl_capi_status nixl_capi_invalidate_remote_md(nixl_capi_agent *agent, const char *name);
enum nixl_capi_status nixl_capi_agent_make_connection(
    nixl_capi_agent *agent, const char *name, nixl_capi_options *options);

/* `name` is the empty string for this agent's own memory. */
enum nixl_capi_status nixl_capi_prep_xfer_dlist(
    nixl_capi_agent *agent, const char *name, nixl_capi_descriptors *descriptors,
    nixl_capi_prepared **prepared, nixl_capi_options *options);
enum nixl_capi_status nixl_capi_release_xfer_dlist_handle(
    nixl_capi_agent *agent, nixl_capi_prepared *prepared);

/* Copies the indices. */
enum nixl_capi_status nixl_capi_make_xfer_req(
    nixl_capi_agent *agent, enum nixl_capi_operation operation, nixl_capi_prepared *local,
    const int *local_indices, size_t local_count, nixl_capi_prepared *remote,
    const int *remote_indices, size_t remote_count, nixl_capi_request **request,
    nixl_capi_options *options);
/* Returns the prediction of the backend's model of its wire, in microseconds. The model ignores load. */
enum nixl_capi_status nixl_capi_estimate_xfer_cost(
    nixl_capi_agent *agent, nixl_capi_request *request, nixl_capi_options *options,
    int64_t *duration_us, int64_t *margin_us, enum nixl_capi_estimate *method);
enum nixl_capi_status nixl_capi_post_xfer_req(
    nixl_capi_agent *agent, nixl_capi_request *request, nixl_capi_options *options);
/* Returns the status, and progresses the worker. */
enum nixl_capi_status nixl_capi_get_xfer_status(
    nixl_capi_agent *agent, nixl_capi_request *request);
/* Cancels the transfer as far as possible, then frees the library's part of the request. */
enum nixl_capi_status nixl_capi_release_xfer_req(
    nixl_capi_agent *agent, nixl_capi_request *request);
/* Frees the handle of a released request. */
enum nixl_capi_status nixl_capi_destroy_xfer_req(nixl_capi_request *request);

enum nixl_capi_status nixl_capi_create_notif_map(nixl_capi_notifications **notifications);
enum nixl_capi_status nixl_capi_destroy_notif_map(nixl_capi_notifications *notifications);
enum nixl_capi_status nixl_capi_notif_map_clear(nixl_capi_notifications *notifications);
/* Returns notifications, and progresses the worker. Without the library's own thread, a target has no
 * other call that progresses the worker. */
enum nixl_capi_status nixl_capi_get_notifs(
    nixl_capi_agent *agent, nixl_capi_notifications *notifications, nixl_capi_options *options);
