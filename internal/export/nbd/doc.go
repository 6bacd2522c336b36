// Package nbd serves block volumes over the Network Block Device protocol, as
// the NBD project's doc/proto.md defines it: fixed newstyle negotiation, TLS,
// structured replies, base:allocation block status, and every transmission
// command that document lists without calling it experimental.
//
// # The way of a request
//
// A connection has one reader goroutine. It reads the socket into a large
// buffer, and does at once whatever the volume can do without waiting (TryRead,
// TryStage with TryCommit). Those replies gather in a batch that leaves with
// one system call when no complete request is buffered any more. Everything
// that may wait — a device read, a flush, a full operation log, a trim — goes
// to a worker goroutine of the connection; its reply leaves as soon as it is
// there. Whoever has a reply tries to write it without blocking; what the
// socket does not take is left to the connection's writer goroutine, so that
// neither the reader nor a worker ever waits for a client to read.
//
// The payload of a write goes from the socket into the memory that the volume
// staged for it. It is published (committed) only when the last byte is there:
// a client that goes away, or that is cut, in the middle of a payload has
// written nothing.
//
// # Invariants
//
//   - A staged write ends in exactly one of commit and abort.
//   - requests in flight <= Limits.Requests and bytes in flight <=
//     Limits.Bytes plus one request, for each connection. A request is in
//     flight from dispatch until the last byte of its reply was taken by the
//     socket.
//   - Bytes staged for payloads that are still on their way <=
//     Limits.StagedBytes over all connections: beyond that payloads wait
//     in memory of the connection and not in the operation log.
//   - Only the holder of replies.writing writes to the socket.
//   - A connection checks requests against the size it was told when it
//     connected; a volume that grows is seen by new connections.
//
// # A volume that goes away
//
// When the volume says that it was closed or lost to a higher epoch, the
// request is not answered: the connection is cut. An error reply would reach
// the client's file system as an I/O error, whereas a cut connection makes
// clients reconnect, and then they find the new owner.
//
// # Shared listeners
//
// The listening socket may be open in several processes of which only the
// owner of the identity accepts. Serve therefore never closes it: closing is
// harmless to the others only by file descriptor, and a later Serve needs it
// again. Accept is interrupted by a deadline in the past ([net.TCPListener] and
// [net.UnixListener] have SetDeadline, which belongs to this process alone), and
// what waits in the backlog stays there for the next owner.
//
// # Locks
//
// Server.mu, wire.mu and replies.mu are leaves: none is held while another is
// taken, nor across a call to a volume or a blocking system call.
package nbd
