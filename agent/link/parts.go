package link

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// MaxParts is how many messages, and texts in lists, there may be in a message, all the way down: an empty one is 2 bytes, and about 100 once it is
// read. What MaxMessage allows would be gigabytes.
const MaxParts = 1 << 20

// Bounded fails where the bytes of a message of m's type have more than MaxParts in them. It reads no more of them than it needs to count, and
// leaves it to proto.Unmarshal to say what else is wrong.
func Bounded(b []byte, m proto.Message) error {
	if n := parts(b, m.ProtoReflect().Descriptor()); n > MaxParts {
		return fmt.Errorf("link: a message with %d parts in it; at most %d are taken", n, MaxParts)
	}
	return nil
}

func parts(b []byte, d protoreflect.MessageDescriptor) (n int) {
	for len(b) > 0 {
		number, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return n
		}
		b = b[size:]
		if size = protowire.ConsumeFieldValue(number, kind, b); size < 0 {
			return n
		}
		switch f := d.Fields().ByNumber(number); {
		case f == nil || kind != protowire.BytesType:
		case f.Message() != nil:
			inner, _ := protowire.ConsumeBytes(b)
			n += 1 + parts(inner, f.Message())
		case f.IsList():
			n++
		}
		b = b[size:]
	}
	return n
}
