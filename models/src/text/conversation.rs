//! A conversation of several turns, as ids.
//!
//! Decoding is not the inverse of encoding, so an answer that is decoded, put into the template
//! and encoded again may become other ids than the model produced: its KV cache would be thrown
//! away, or worse, stand for another text. Here generated ids stay what they are, and each turn
//! adds only what the template writes *after* the answer:
//!
//! ```text
//! turn 1   <|user|>\nHi<|end|>\n<|assistant|>\n          user("Hi") gives all of it
//!          Hello!<|end|>                                 generated, recorded by assistant(ids)
//! turn 2                       \n<|user|>\nBye...        user("Bye") gives the rest
//! ```
//!
//! The part after the answer is found by rendering the conversation with a mark in the answer's
//! place, whatever the template is.

use super::chat::{ChatTemplate, GenerationPrompt, Message, Role};
use super::error::TextError;
use super::image_tags::{Segment, encode_more};
use super::tokenizer::{Bos, Special, Tokenizer};

/// Several turns with one model: the messages, and the ids that stand for them.
#[derive(Clone, Debug)]
pub struct Conversation {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: Option<Message>,
    /// Questions and answers in turn; the system message is apart.
    messages: Vec<Message>,
    /// Everything the model has been given or has generated; [`PLACEHOLDER`] where pictures stand.
    ids: Vec<u32>,
    /// Pictures so far.
    pictures: usize,
    /// What there was before the question that waits for its answer.
    before_question: Length,
}

/// How long a conversation is.
#[derive(Clone, Copy, Debug, Default)]
struct Length {
    ids: usize,
    pictures: usize,
}

/// What stands among the ids where pictures are; the reference looks up the same one there.
pub const PLACEHOLDER: u32 = 0;

impl Conversation {
    /// An empty conversation.
    pub fn new(tokenizer: Tokenizer, template: ChatTemplate) -> Self {
        Self {
            tokenizer,
            template,
            system: None,
            messages: Vec::new(),
            ids: Vec::new(),
            pictures: 0,
            before_question: Length::default(),
        }
    }

    /// Asks a question and gives the ids to append to those the model has seen.
    ///
    /// First turn: the whole prompt, with a beginning-of-sequence token if the tokenizer adds one
    /// by default (and once, if the template writes it too). Later: the end of the last answer,
    /// unless that was generated, then the question and the opening of the next answer. A question
    /// that was never answered counts as answered with nothing.
    ///
    /// Special tokens spelled out in `text` are read as such; see [`Message`].
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`]; [`TextError::AnswersDropped`]. The
    /// conversation is then as it was.
    pub fn user(&mut self, text: &str) -> Result<Vec<u32>, TextError> {
        let question = Message::user(text);
        let new_ids = if self.messages.is_empty() {
            let prompt = self.opening(&question)?;
            self.tokenizer
                .encode(&prompt, self.tokenizer.default_bos())?
        } else {
            let rest = self.rest(&question)?;
            let mut ids = self.tokenizer.encode(&rest, Bos::Omit)?;
            self.without_second_end(&mut ids);
            ids
        };
        self.asked(question, new_ids.clone(), 0);
        Ok(new_ids)
    }

    /// Asks a question with pictures, of so many positions each: a tag for each of them goes before the
    /// text, counting on from the pictures there are. Gives the segments to append; their pictures are
    /// numbered in the whole conversation.
    ///
    /// # Errors
    /// As [`user`](Self::user); tags in `text` itself.
    pub fn user_with_pictures(
        &mut self,
        text: &str,
        image_tokens: &[usize],
    ) -> Result<Vec<Segment>, TextError> {
        let (seen, count) = (self.pictures, image_tokens.len());
        let tags = (seen + 1..=seen + count).map(|n| format!("<|image_{n}|>\n"));
        let question = Message::user(tags.collect::<String>() + text);
        let (text, bos) = match self.messages.is_empty() {
            true => (self.opening(&question)?, self.tokenizer.default_bos()),
            false => (self.rest(&question)?, Bos::Omit),
        };
        let mut segments = encode_more(&self.tokenizer, &text, bos, seen, image_tokens)?;
        if let (false, Some(Segment::Text(ids))) = (self.messages.is_empty(), segments.first_mut())
        {
            self.without_second_end(ids);
        }
        let ids = segments.iter().flat_map(|segment| match segment {
            Segment::Text(ids) => ids.clone(),
            Segment::Image { tokens, .. } => vec![PLACEHOLDER; *tokens],
        });
        self.asked(question, ids.collect(), count);
        Ok(segments)
    }

    /// Records a question.
    fn asked(&mut self, question: Message, ids: Vec<u32>, pictures: usize) {
        if self.waits_for_answer() {
            self.messages.push(Message::assistant(""));
        }
        self.messages.push(question);
        self.before_question = Length {
            ids: self.ids.len(),
            pictures: self.pictures,
        };
        self.ids.extend(ids);
        self.pictures += pictures;
    }

    /// The whole prompt of the first question.
    fn opening(&self, question: &Message) -> Result<String, TextError> {
        let messages: Vec<Message> = self.system.iter().chain([question]).cloned().collect();
        self.template.render(&messages, GenerationPrompt::Add)
    }

    /// What follows the last answer when another question is asked.
    fn rest(&self, question: &Message) -> Result<String, TextError> {
        let answered = self.messages.len() - usize::from(!self.waits_for_answer());
        let before: Vec<Message> = self
            .system
            .iter()
            .chain(&self.messages[..answered])
            .cloned()
            .collect();
        let rest = self.template.after_answer(&before, Some(question))?;
        rest.ok_or_else(|| TextError::AnswersDropped {
            origin: self.template.origin().into(),
        })
    }

    /// A clean answer ends with the token that ends its turn: it is not said twice.
    fn without_second_end(&self, ids: &mut Vec<u32>) {
        if let (Some(&first), Some(&last)) = (ids.first(), self.ids.last())
            && first == last
            && self.tokenizer.is_special(first)
            && !self.waits_for_answer()
        {
            ids.remove(0);
        }
    }

    /// Records the ids that were generated in answer to the last question, with or without the
    /// token that ends the turn: an answer may be cut short. These ids count as seen by the model
    /// and must be those in its KV cache; a stop token other than the template's own end of turn
    /// does not belong to them.
    ///
    /// # Errors
    /// [`TextError::NoQuestion`]; [`TextError::UnknownId`]. The conversation is then as it was.
    pub fn assistant(&mut self, ids: &[u32]) -> Result<(), TextError> {
        if !self.waits_for_answer() {
            return Err(TextError::NoQuestion);
        }
        let text = self.tokenizer.decode(ids, Special::Skip)?;
        self.messages.push(Message::assistant(text));
        self.ids.extend_from_slice(ids);
        Ok(())
    }

    /// Takes back the last question if it was not answered, for instance because the context is
    /// full. Gives its text; [`ids`](Self::ids) are what they were before it.
    pub fn take_back(&mut self) -> Option<String> {
        if !self.waits_for_answer() {
            return None;
        }
        self.ids.truncate(self.before_question.ids);
        self.pictures = self.before_question.pictures;
        self.messages.pop().map(|question| question.content)
    }

    /// Sets the system message, or takes it away (an empty one is none). It stands before everything else, so the
    /// conversation begins anew.
    ///
    /// # Errors
    /// [`TextError::SystemUnsupported`] when the template would leave the message out. The
    /// conversation is then as it was.
    pub fn system(&mut self, text: Option<String>) -> Result<(), TextError> {
        let text = text.filter(|text| !text.is_empty());
        if text.is_some() && !self.system_supported() {
            return Err(TextError::SystemUnsupported {
                origin: self.template.origin().into(),
            });
        }
        self.system = text.map(Message::system);
        self.clear();
        Ok(())
    }

    /// Whether the template has a place for a system message.
    pub fn system_supported(&self) -> bool {
        self.template.supports_system()
    }

    /// Forgets every turn, but not the system message.
    pub fn clear(&mut self) {
        self.messages.clear();
        self.ids.clear();
        self.pictures = 0;
        self.before_question = Length::default();
    }

    /// Everything the model has been given or has generated, in order.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Questions and answers so far, without the system message.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The system message.
    pub fn system_message(&self) -> Option<&str> {
        self.system.as_ref().map(|message| message.content.as_str())
    }

    fn waits_for_answer(&self) -> bool {
        self.messages
            .last()
            .is_some_and(|message| message.role == Role::User)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Builtin;
    use crate::text::fixture::{mini, vision};

    const END: u32 = 32007;

    fn conversation(tokenizer: Tokenizer, builtin: Builtin) -> Conversation {
        Conversation::new(tokenizer, ChatTemplate::builtin(builtin).unwrap())
    }

    /// Both flag sets, and every template that writes only tokens they have.
    fn everywhere() -> impl Iterator<Item = Conversation> {
        use Builtin::*;
        [mini(), vision()].into_iter().flat_map(|tokenizer| {
            [Phi3Mini, Phi3Medium, Phi3Vision, Phi35Mini]
                .map(|builtin| conversation(tokenizer.clone(), builtin))
        })
    }

    /// The ids of an answer as a model would give them.
    fn answer(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        let after_opening = format!("<|assistant|>\n{text}<|end|>");
        tokenizer.encode(&after_opening, Bos::Omit).unwrap()[1..].to_vec()
    }

    #[test]
    fn clean_turns_add_up_to_the_whole_rendering() {
        for mut talk in everywhere() {
            let tokenizer = talk.tokenizer.clone();
            let mut fed = Vec::new();
            let turns = [
                ("Hi", "Hello!"),
                ("Bye ", "你好 𝔾\nok"),
                ("  x", ""),
                ("last", ""),
            ];
            for (i, (question, reply)) in turns.iter().enumerate() {
                fed.extend(talk.user(question).unwrap());
                if i + 1 < turns.len() {
                    let ids = answer(&tokenizer, reply);
                    talk.assistant(&ids).unwrap();
                    fed.extend(ids);
                }
            }
            assert_eq!(talk.ids(), fed);
            let rendered = talk
                .template
                .render(talk.messages(), GenerationPrompt::Add)
                .unwrap();
            let whole = tokenizer
                .encode(&rendered, tokenizer.default_bos())
                .unwrap();
            assert_eq!(fed, whole, "{:?} {:?}", tokenizer, talk.template);
        }
    }

    /// What was generated stays, even where encoding its text would give other ids.
    #[test]
    fn generated_ids_are_kept() {
        for mut talk in everywhere() {
            let odd: Vec<u32> = "hello"
                .chars()
                .map(|c| talk.tokenizer.id_of(&c.to_string()).unwrap())
                .collect();
            let first = talk.user("Hi").unwrap();
            talk.assistant(&[&odd[..], &[END]].concat()).unwrap();
            let second = talk.user("Bye").unwrap();
            assert_eq!(talk.ids(), [&first[..], &odd, &[END], &second].concat());
            assert_ne!(second.first(), Some(&END));
            assert_eq!(talk.messages()[1], Message::assistant("hello"));
        }
    }

    #[test]
    fn a_cut_answer_gets_its_end() {
        for mut talk in everywhere() {
            talk.user("Hi").unwrap();
            talk.assistant(&[15043]).unwrap();
            assert_eq!(talk.user("Bye").unwrap().first(), Some(&END));
        }
    }

    #[test]
    fn an_unanswered_question_is_closed_or_taken_back() {
        for mut talk in everywhere() {
            let first = talk.user("Hi").unwrap();
            let mut other = talk.clone();
            other.assistant(&[]).unwrap();
            let second = talk.user("Bye").unwrap();
            assert_eq!(second, other.user("Bye").unwrap());
            assert_eq!(second.first(), Some(&END));
            assert_eq!(talk.messages(), other.messages());
            assert_eq!(talk.take_back().as_deref(), Some("Bye"));
            assert_eq!(talk.ids(), first);
            assert_eq!(talk.take_back(), None);
            assert_eq!(talk.user("Bye").unwrap(), second);
        }
    }

    /// The first mini template writes `<s>` itself, and the vision tokenizer adds it too.
    #[test]
    fn one_bos() {
        let begins =
            |tokenizer, builtin| conversation(tokenizer, builtin).user("Hi").unwrap()[..2].to_vec();
        assert_eq!(begins(vision(), Builtin::Phi3Mini), [1, 32010]);
        assert_eq!(begins(vision(), Builtin::Phi3Vision), [1, 32010]);
        assert_eq!(begins(mini(), Builtin::Phi3Mini), [1, 32010]);
        assert_eq!(begins(mini(), Builtin::Phi35Mini)[0], 32010);
    }

    #[test]
    fn system_messages() {
        let mut talk = conversation(mini(), Builtin::Phi35Mini);
        talk.system(Some("Be brief.".into())).unwrap();
        assert_eq!(talk.user("Hi").unwrap()[0], 32006);
        talk.clear();
        assert_eq!(
            (talk.ids(), talk.system_message()),
            (&[][..], Some("Be brief."))
        );
        assert_eq!(talk.user("Hi").unwrap()[0], 32006);
        talk.system(None).unwrap();
        assert_eq!(talk.user("Hi").unwrap()[0], 32010);

        let mut talk = conversation(mini(), Builtin::Phi3Mini);
        talk.user("Hi").unwrap();
        let error = talk.system(Some("Be brief.".into())).unwrap_err();
        assert!(
            matches!(error, TextError::SystemUnsupported { .. }),
            "{error}"
        );
        assert!(!talk.ids().is_empty());
        talk.system(Some(String::new())).unwrap();
    }

    #[test]
    fn out_of_turn() {
        let mut talk = conversation(mini(), Builtin::Phi35Mini);
        assert!(matches!(talk.assistant(&[263]), Err(TextError::NoQuestion)));
        talk.user("Hi").unwrap();
        assert!(matches!(
            talk.assistant(&[40_000]),
            Err(TextError::UnknownId { .. })
        ));
        talk.assistant(&[263]).unwrap();
        assert!(matches!(talk.assistant(&[263]), Err(TextError::NoQuestion)));
    }

    #[test]
    fn a_template_without_answers_has_one_turn() {
        let source = "{{ messages[-1].content }}".to_string();
        let template = ChatTemplate::new(source, "here", None, None).unwrap();
        let mut talk = Conversation::new(mini(), template);
        talk.user("Hi").unwrap();
        talk.assistant(&[263]).unwrap();
        let before = talk.ids().to_vec();
        assert!(matches!(
            talk.user("Bye"),
            Err(TextError::AnswersDropped { .. })
        ));
        assert_eq!((talk.ids(), talk.messages().len()), (&before[..], 2));
    }

    /// Pictures are numbered through, their positions are placeholders, and every piece after one begins
    /// anew, in later turns as in the first.
    #[test]
    fn pictures_in_several_turns() {
        let mut talk = conversation(vision(), Builtin::Phi3Vision);
        let tokenizer = talk.tokenizer.clone();
        let first = talk.user_with_pictures("What?", &[3]).unwrap();
        let whole = crate::text::encode_with_images(
            &tokenizer,
            "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n",
            &[3],
        );
        assert_eq!(first, whole.unwrap());
        assert_eq!(
            talk.ids().iter().filter(|id| **id == PLACEHOLDER).count(),
            3
        );
        let before = talk.ids().to_vec();
        talk.assistant(&[263, END]).unwrap();
        let second = talk.user_with_pictures("And?", &[2, 4]).unwrap();
        let images: Vec<_> = (second.iter())
            .filter_map(|segment| match segment {
                Segment::Image { index, tokens } => Some((*index, *tokens)),
                Segment::Text(_) => None,
            })
            .collect();
        assert_eq!(images, [(1, 2), (2, 4)]);
        let (Segment::Text(head), Some(Segment::Text(tail))) = (&second[0], second.last()) else {
            panic!("text at both ends");
        };
        // The end of the answer was generated; the pieces after pictures begin with <s>.
        assert_ne!(head[0], END);
        assert_eq!(tail[0], 1);
        let length: usize = second.iter().map(Segment::len).sum();
        assert_eq!(talk.ids().len(), before.len() + 2 + length);
        talk.take_back().unwrap();
        assert_eq!(talk.ids().len(), before.len() + 2);
        // Taken back: the next picture is the second one again.
        let again = talk.user_with_pictures("And?", &[2]).unwrap();
        assert!(
            again
                .iter()
                .any(|s| matches!(s, Segment::Image { index: 1, .. }))
        );
        assert!(talk.user_with_pictures("<|image_1|>", &[2]).is_err());
    }

    /// As in the reference: a special token in what the user typed is that token.
    #[test]
    fn special_tokens_in_a_question_are_read() {
        let ids = conversation(mini(), Builtin::Phi35Mini)
            .user("a<|end|>b")
            .unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == END).count(), 2);
    }
}
