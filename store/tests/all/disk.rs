//! Values on disk: more than memory holds, restarts, torn files.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use store::cache::{Cache, Missing, OpenError};
use store::entry::About;

use crate::client::{EXIST, GET, MIB, Running, body, bounds, sizes, until};

const VALUES: u8 = 40;

/// The number of values of one MiB that may wait for the disk. The cache has buffers for twice as many.
const WAITING: usize = 16;

/// Waits until the disk has all but the last values up to number `i`. The disk may be slower than a loop of puts. What
/// waits for the disk is limited, and values beyond the limit stay in memory alone.
async fn written(cache: &Cache, i: usize) {
    let least = (i.saturating_sub(WAITING) * MIB) as u64;
    until("the values are on disk", || cache.disk_bytes().0 >= least).await;
}

async fn fill(folder: &Path) {
    let store = Running::start(&sizes(Some(folder)), bounds()).await;
    let mut client = store.connect().await;
    for i in 0..VALUES {
        client.put(&format!("k{i}"), &body(i, MIB)).await;
        assert_eq!(client.ask(EXIST, &format!("k{i}")).await.code, 200);
        written(&store.cache, usize::from(i)).await;
    }
    assert!(store.cache.memory_bytes() <= 16 * MIB);
    for i in 0..VALUES {
        let got = client.ask(GET, &format!("k{i}")).await;
        assert_eq!((got.code, got.body), (200, body(i, MIB)), "k{i}");
    }
    let from_disk = r#"pd_store_requests_total{operation="get",outcome="hit_on_disk"}"#;
    assert!(store.metric(from_disk).unwrap() >= 20.0);
    store.end().await;
}

#[tokio::test]
async fn values_outlive_the_process() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path()).await;
    let store = Running::start(&sizes(Some(folder.path())), bounds()).await;
    let mut client = store.connect().await;
    for i in 0..VALUES {
        let got = client.ask(GET, &format!("k{i}")).await;
        assert_eq!((got.code, got.body), (200, body(i, MIB)), "k{i}");
    }
    store.end().await;
}

#[tokio::test]
async fn a_torn_value_is_missing_and_never_served() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path()).await;
    // Change one byte in each half MiB of all files, as a torn write or a bad disk would.
    for file in fs::read_dir(folder.path()).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        for byte in bytes.iter_mut().skip(1000).step_by(MIB / 2) {
            *byte ^= 0x55;
        }
        fs::write(&path, bytes).unwrap();
    }
    let store = Running::start(&sizes(Some(folder.path())), bounds()).await;
    let mut client = store.connect().await;
    for i in 0..VALUES {
        let got = client.ask(GET, &format!("k{i}")).await;
        assert_eq!(got.code, 400, "k{i}");
        let exist = client.ask(EXIST, &format!("k{i}")).await;
        assert_eq!(
            exist.code, 400,
            "k{i}: a look-up promises what cannot be read"
        );
    }
    // The store works on.
    client.put("new", &body(9, MIB)).await;
    assert_eq!(client.ask(GET, "new").await.body, body(9, MIB));
    store.end().await;
}

#[tokio::test]
async fn wrong_sizes_and_folders_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut small = sizes(Some(folder.path()));
    small.disk.as_mut().unwrap().bytes = 20 * MIB;
    let error = Cache::open(&small, None).await.unwrap_err();
    assert!(matches!(error, OpenError::TooSmall { .. }), "{error}");
    let mut huge = sizes(Some(folder.path()));
    huge.disk.as_mut().unwrap().bytes = 1 << 60;
    let error = Cache::open(&huge, None).await.unwrap_err();
    assert!(matches!(error, OpenError::NoRoom { .. }), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let error = Cache::open(&sizes(Some(&file)), None).await.unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
    assert!(matches!(error, OpenError::Folder { .. }), "{error}");
}

#[tokio::test]
async fn values_beyond_the_disk_are_evicted_and_the_newest_stay() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(&sizes(Some(folder.path())), None)
        .await
        .unwrap();
    for i in 0..250u8 {
        cache.put(vec![i], About::default(), Bytes::from(body(i, MIB)));
        written(&cache, usize::from(i)).await;
    }
    assert!(cache.get(&vec![249]).await.is_ok());
    assert_eq!(cache.get(&vec![0]).await.unwrap_err(), Missing::Absent);
    let used: u64 = fs::read_dir(folder.path())
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(used <= 128 * MIB as u64, "{used}");
    cache.close(Duration::ZERO).await;
}
