package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"
	"io"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	ready "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/protobuf/encoding/protowire"
)

// What a sidecar is sent repeats itself: to a third of its size, or less, it can be compressed. To do so for each sidecar would cost more CPU than all
// else, but replicas get the same resources. So a response is written as two gzip members, which together are a gzip stream (RFC 1952, 2.2): the
// resources, compressed once for whoever gets the same, and the rest, which holds the nonce, as it is.

func init() { encoding.RegisterCompressor(&compressor{Compressor: encoding.GetCompressor(ready.Name)}) }

// compress has responses compressed where the client says that it can read them (grpc-accept-encoding).
func compress(ctx context.Context) error {
	can, err := grpc.ClientSupportedCompressors(ctx)
	if err != nil || !slices.Contains(can, ready.Name) {
		return err
	}
	return grpc.SetSendCompressor(ctx, ready.Name)
}

const (
	// worthwhile is the least size of resources that are compressed.
	worthwhile = 256
	// mostCompressed is the most: what is larger would hold up everybody else's, for a tenth of a second for every few megabytes, and is sent as it is.
	mostCompressed = 256 << 10
	// mostKept bounds one entry, keptEntries their number: what is sent right now is the same few resources, over and over.
	mostKept    = 64 << 10
	keptEntries = 256
)

// compressor is gRPC's for reading. It is safe for concurrent use.
type compressor struct {
	encoding.Compressor

	mu     sync.Mutex
	kept   map[[sha256.Size]byte][]byte // members, by what is in them
	oldest [][sha256.Size]byte

	writing sync.Mutex
	writer  *gzip.Writer // one for all: it has 800 KB, and what is new is seldom

	messages sync.Pool // of *message, whose memory is used again
}

func (c *compressor) Compress(w io.Writer) (io.WriteCloser, error) {
	m, _ := c.messages.Get().(*message)
	if m == nil {
		m = &message{compressor: c}
	}
	m.out = w
	return m, nil
}

// message is one message on its way out. It is written when it is complete.
type message struct {
	*compressor
	out   io.Writer
	plain []byte
	rest  []byte // as it is written
}

func (m *message) Write(p []byte) (int, error) {
	m.plain = append(m.plain, p...)
	return len(p), nil
}

// Close writes the message, after which it is another one's: gRPC closes it once, and does not touch it any more.
func (m *message) Close() error {
	err := m.write()
	if m.out = nil; max(cap(m.plain), cap(m.rest)) <= mostKept {
		m.plain, m.rest = m.plain[:0], m.rest[:0]
		m.messages.Put(m)
	}
	return err
}

func (m *message) write() error {
	b := m.plain
	n := sharedEnd(b)
	if n >= worthwhile && n <= mostCompressed {
		member, err := m.member(b[:n])
		if err != nil {
			return err
		}
		if _, err := m.out.Write(member); err != nil {
			return err
		}
		b = b[n:]
	}
	m.rest = stored(m.rest, b)
	_, err := m.out.Write(m.rest)
	return err
}

// sharedEnd is where that ends with which a DeltaDiscoveryResponse begins and which is the same for replicas: the resources (field 2) and their type
// (field 4). 0: it begins with something else.
func sharedEnd(b []byte) (n int) {
	for n < len(b) {
		field, _, length := protowire.ConsumeField(b[n:])
		if field != 2 && field != 4 || length < 0 {
			return n
		}
		n += length
	}
	return n
}

// member compresses something, or finds it compressed.
func (c *compressor) member(b []byte) ([]byte, error) {
	key := sha256.Sum256(b)
	c.mu.Lock()
	is := c.kept[key]
	c.mu.Unlock()
	if is != nil {
		return is, nil
	}
	out, err := c.compress(b)
	if err == nil && len(out) <= mostKept {
		c.keep(key, out)
	}
	return out, err
}

func (c *compressor) compress(b []byte) ([]byte, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.writer == nil {
		c.writer = gzip.NewWriter(nil)
	}
	var out bytes.Buffer
	c.writer.Reset(&out)
	if _, err := c.writer.Write(b); err != nil {
		return nil, err
	}
	if err := c.writer.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func (c *compressor) keep(key [sha256.Size]byte, member []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept[key] != nil {
		return // two at once
	}
	if c.kept == nil {
		c.kept = map[[sha256.Size]byte][]byte{}
	}
	if len(c.oldest) == keptEntries {
		delete(c.kept, c.oldest[0])
		c.oldest = slices.Delete(c.oldest, 0, 1)
	}
	c.kept[key] = member
	c.oldest = append(c.oldest, key)
}

// maxStored is the most that one stored block can hold (RFC 1951, 3.2.4).
const maxStored = 1<<16 - 1

// stored appends a gzip member that holds something as it is.
func stored(out, b []byte) []byte {
	out = slices.Grow(out, len(b)+32)
	out = append(out, 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255) // deflate, no name, no time, unknown system
	for rest := b; ; {
		block := rest[:min(len(rest), maxStored)]
		rest = rest[len(block):]
		final := byte(0)
		if len(rest) == 0 {
			final = 1
		}
		out = append(out, final)
		out = binary.LittleEndian.AppendUint16(out, uint16(len(block)))
		out = binary.LittleEndian.AppendUint16(out, ^uint16(len(block)))
		out = append(out, block...)
		if final == 1 {
			break
		}
	}
	out = binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(b))
	return binary.LittleEndian.AppendUint32(out, uint32(len(b)))
}
