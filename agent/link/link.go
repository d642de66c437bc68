package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// MaxMessage is how many bytes a message may have: more than the verdicts on 100,000 identities or addresses take.
const MaxMessage = 32 << 20

// Link is one end of a connection. Send may be called from many goroutines, Receive from one at a time.
type Link struct {
	conn io.ReadWriter

	mu sync.Mutex // of writing
}

// New returns the end of a connection, which stays the caller's to close.
func New(conn io.ReadWriter) *Link { return &Link{conn: conn} }

// Send writes a message.
func (l *Link) Send(m proto.Message) error {
	b, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 4, 64), m)
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	if len(b)-4 > MaxMessage {
		return fmt.Errorf("link: a message of %d bytes; at most %d are taken", len(b)-4, MaxMessage)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.conn.Write(b); err != nil {
		return fmt.Errorf("link: %w", err)
	}
	return nil
}

// Receive reads a message into m, which it empties before. At the end of the connection, between two messages, it returns io.EOF.
func (l *Link) Receive(m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(l.conn, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return err
		}
		return fmt.Errorf("link: %w", err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxMessage {
		return fmt.Errorf("link: a message of %d bytes is announced; at most %d are taken", n, MaxMessage)
	}
	var b bytes.Buffer // grows as the bytes come: announcing much costs nothing
	if got, err := io.CopyN(&b, l.conn, int64(n)); err != nil {
		return fmt.Errorf("link: a message ends after %d of %d bytes: %w", got, n, err)
	}
	if err := Bounded(b.Bytes(), m); err != nil {
		return err
	}
	if err := proto.Unmarshal(b.Bytes(), m); err != nil {
		return fmt.Errorf("link: %w", err)
	}
	if unknown(m.ProtoReflect()) {
		return errors.New("link: a message has a field that is not known; agent and daemon are to be of one version")
	}
	return nil
}

// unknown reports whether a message, or one in it, has a field that is not known.
func unknown(m protoreflect.Message) (found bool) {
	if len(m.GetUnknown()) > 0 {
		return true
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Kind() != protoreflect.MessageKind:
		case f.IsList():
			for i := range v.List().Len() {
				found = found || unknown(v.List().Get(i).Message())
			}
		default:
			found = unknown(v.Message())
		}
		return !found
	})
	return found
}
