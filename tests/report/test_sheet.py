from PIL import Image

from flows.report.sheet import in_rows, opened, sheet

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def plain(colour, side=4):
    return Image.new("RGB", (side, side), colour)


def test_images_stand_in_rows_on_white():
    found = sheet([[plain(RED), plain(BLUE)], [plain(GREEN)]])
    assert found.size == (8, 8)
    assert [found.getpixel(place) for place in ((0, 0), (4, 0), (0, 4), (4, 4))] == [RED, BLUE, GREEN, (255,) * 3]


def test_gaps_headings_and_names_make_room_for_themselves():
    bare = sheet([[plain(RED)]], size=(32, 16), gap=6)
    assert bare.size == (44, 28) and bare.getpixel((6, 6)) == RED and bare.getpixel((5, 6)) == (255,) * 3
    headed = sheet([[plain(RED)]], size=(32, 16), gap=6, headings=["arm"], names=[["a"]])
    assert headed.width == 44 and headed.height > bare.height + 20
    assert headed.getpixel((6, headed.height - bare.height - 12 + 6)) == RED
    assert headed.crop((6, 0, 44, 18)).convert("L").getextrema()[0] < 128, "the heading is written"


def test_a_small_image_keeps_its_pixels():
    checks = plain(RED, 2)
    checks.putpixel((0, 0), BLUE)
    grown = sheet([[checks]], size=(8, 8))
    assert {colour for _, colour in grown.getcolors()} == {RED, BLUE} and grown.getpixel((3, 3)) == BLUE


def test_items_in_rows_leave_the_rest_in_the_last():
    assert in_rows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_an_opened_file_is_closed(tmp_path):
    plain(RED).save(tmp_path / "a.png")
    found = opened(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert found.getpixel((1, 1)) == RED
