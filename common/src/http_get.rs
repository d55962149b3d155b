//! Reads one short page over HTTP, for programs that look at other programs.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::DATE;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

/// An answer of any status.
#[derive(Clone, Debug)]
pub struct Page {
    /// The status of the answer.
    pub status: u16,
    /// The text of the header `Date`; empty if it is absent.
    pub date: String,
    /// The body, at most [`MAX_BYTES`].
    pub body: Bytes,
}

/// A page that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url}: {cause}")]
pub struct Unread {
    /// The URL.
    pub url: String,
    /// The reason.
    pub cause: String,
}

/// Reads a page. The URL must begin with `http://`.
///
/// # Errors
/// The URL is wrong, the server does not answer within `bound`, or its answer is too long.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub async fn get(url: &str, bound: Duration) -> Result<Page, Unread> {
    let unread = |cause: String| Unread {
        url: url.to_owned(),
        cause,
    };
    match tokio::time::timeout(bound, read(url)).await {
        Ok(read) => read.map_err(unread),
        Err(_) => Err(unread(format!("no answer within {bound:?}"))),
    }
}

async fn read(url: &str) -> Result<Page, String> {
    let request = Request::get(url).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| error.to_string())?;
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let answer = client
        .request(request)
        .await
        .map_err(|error| whole(&error))?;
    let date = answer
        .headers()
        .get(DATE)
        .and_then(|date| date.to_str().ok());
    let (status, date) = (
        answer.status().as_u16(),
        date.unwrap_or_default().to_owned(),
    );
    let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await;
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    Ok(Page { status, date, body })
}

/// Returns an error with its causes, because the outermost text of the client is only "client error".
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Largest body. The limit protects this process if the URL leads to a wrong server.
pub const MAX_BYTES: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Serves one connection with `answer`; without an answer keeps the connection open.
    async fn server(answer: Option<&'static str>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/status", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let read = stream.read(&mut head).await.unwrap();
            assert!(head[..read].starts_with(b"GET /status HTTP/1.1"));
            match answer {
                Some(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
                None => std::future::pending().await,
            }
        });
        url
    }

    #[tokio::test]
    async fn a_page_has_status_date_and_body() {
        let url = server(Some(
            "HTTP/1.1 503 x\r\ndate: Mon, 30 Nov 2026 12:00:00 GMT\r\ncontent-length: 2\r\n\r\nno",
        ));
        let page = get(&url.await, Duration::from_secs(5)).await.unwrap();
        assert_eq!((page.status, &page.body[..]), (503, &b"no"[..]));
        assert_eq!(page.date, "Mon, 30 Nov 2026 12:00:00 GMT");
    }

    #[tokio::test]
    async fn a_silent_server_and_a_closed_port_are_errors_with_a_cause() {
        let silent = get(&server(None).await, Duration::from_millis(50)).await;
        assert!(silent.unwrap_err().cause.contains("no answer within"));
        let closed = get("http://127.0.0.1:1/", Duration::from_secs(5)).await;
        assert!(closed.unwrap_err().to_string().contains("refused"));
        for wrong in ["127.0.0.1:7900", "https://127.0.0.1/", "http://"] {
            assert!(get(wrong, Duration::from_secs(5)).await.is_err(), "{wrong}");
        }
    }
}
