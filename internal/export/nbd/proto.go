package nbd

// Magic numbers.
const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x3e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake flags of the server, and their answers of the client.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagSendFlush    = 1 << 2
	flagSendFUA      = 1 << 3
	flagSendTrim     = 1 << 5
	flagSendZeroes   = 1 << 6
	flagSendDF       = 1 << 7
	flagMultiConn    = 1 << 8
	flagSendCache    = 1 << 10
	flagSendFastZero = 1 << 11
)

// Options.
const (
	optExportName  = 1
	optAbort       = 2
	optList        = 3
	optStartTLS    = 5
	optInfo        = 6
	optGo          = 7
	optStructured  = 8
	optListContext = 9
	optSetContext  = 10
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup    = 1<<31 + 1
	repErrPolicy   = 1<<31 + 2
	repErrInvalid  = 1<<31 + 3
	repErrTLSReqd  = 1<<31 + 5
	repErrUnknown  = 1<<31 + 6
	repErrShutdown = 1<<31 + 7
	repErrTooBig   = 1<<31 + 9
)

// Kinds of information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Structured reply chunks.
const (
	chunkDone = 1 << 0 // flag of the last chunk of a reply

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// Status flags of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// contextAllocation is the only metadata context there is, and its number on
// every connection that selected it.
const (
	contextAllocation   = "base:allocation"
	contextAllocationID = 1
)

// Sizes of what travels.
const (
	requestSize    = 28
	simpleSize     = 16
	chunkSize      = 20            // header of a structured chunk
	dataChunkSize  = chunkSize + 8 // before the data of an OFFSET_DATA chunk
	holeChunkSize  = chunkSize + 12
	optHeaderSize  = 16
	maxStringBytes = 4096 // of any string, by the protocol
)

// Block sizes told to clients.
const (
	minBlock       = 1
	preferredBlock = 4096
)

// errno is an error number of the protocol.
type errno uint32

// Error numbers that the protocol allows.
const (
	eOK       errno = 0
	ePerm     errno = 1
	eIO       errno = 5
	eInval    errno = 22
	eNoSpace  errno = 28
	eOverflow errno = 75
	eNotSup   errno = 95
	eShutdown errno = 108
)
