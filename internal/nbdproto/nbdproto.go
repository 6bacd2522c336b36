// Package nbdproto has the numbers of the network block device protocol, for those who
// speak it from either end: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md.
package nbdproto

// Magic numbers.
const (
	MagicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	MagicOption     = 0x49484156454f5054 // "IHAVEOPT"
	MagicOptReply   = 0x3e889045565a9
	MagicRequest    = 0x25609513
	MagicSimple     = 0x67446698
	MagicStructured = 0x668e33ef
)

// Handshake flags of the server, and their answers of the client.
const (
	FlagFixedNewstyle = 1 << 0
	FlagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	FlagHasFlags     = 1 << 0
	FlagReadOnly     = 1 << 1
	FlagSendFlush    = 1 << 2
	FlagSendFUA      = 1 << 3
	FlagRotational   = 1 << 4
	FlagSendTrim     = 1 << 5
	FlagSendZeroes   = 1 << 6
	FlagSendDF       = 1 << 7
	FlagMultiConn    = 1 << 8
	FlagSendCache    = 1 << 10
	FlagSendFastZero = 1 << 11
)

// Options.
const (
	OptExportName  = 1
	OptAbort       = 2
	OptList        = 3
	OptStartTLS    = 5
	OptInfo        = 6
	OptGo          = 7
	OptStructured  = 8
	OptListContext = 9
	OptSetContext  = 10
)

// Replies to options.
const (
	RepAck         = 1
	RepServer      = 2
	RepInfo        = 3
	RepMetaContext = 4

	RepErrUnsup    = 1<<31 + 1
	RepErrPolicy   = 1<<31 + 2
	RepErrInvalid  = 1<<31 + 3
	RepErrTLSReqd  = 1<<31 + 5
	RepErrUnknown  = 1<<31 + 6
	RepErrShutdown = 1<<31 + 7
	RepErrTooBig   = 1<<31 + 9
)

// Kinds of information about an export.
const (
	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3
)

// Commands.
const (
	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7
)

// Command flags.
const (
	CmdFlagFUA      = 1 << 0
	CmdFlagNoHole   = 1 << 1
	CmdFlagDF       = 1 << 2
	CmdFlagReqOne   = 1 << 3
	CmdFlagFastZero = 1 << 4
)

// Structured reply chunks.
const (
	ChunkDone = 1 << 0 // flag of the last chunk of a reply

	ChunkNone        = 0
	ChunkOffsetData  = 1
	ChunkOffsetHole  = 2
	ChunkBlockStatus = 5
	ChunkError       = 1<<15 + 1
)

// Status flags of base:allocation.
const (
	StateHole = 1 << 0
	StateZero = 1 << 1
)

// ContextAllocation is the metadata context that tells holes from data.
const ContextAllocation = "base:allocation"

// Sizes of what travels.
const (
	RequestSize    = 28
	SimpleSize     = 16
	ChunkSize      = 20            // header of a structured chunk
	DataChunkSize  = ChunkSize + 8 // before the data of an OFFSET_DATA chunk
	HoleChunkSize  = ChunkSize + 12
	OptHeaderSize  = 16
	MaxStringBytes = 4096 // of any string, by the protocol
)

// Errno is an error number of the protocol.
type Errno uint32

// Error numbers that the protocol allows.
const (
	EOK       Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	EINVAL    Errno = 22
	ENOMEM    Errno = 12
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)
